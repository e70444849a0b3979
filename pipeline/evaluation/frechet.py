"""The Fréchet distance between Gaussians fitted to features (Heusel et al. 2017), from streamed moments.

Moments of parts are merged into the moments of the whole, so no process ever holds all features.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np

from pipeline import storage
from pipeline.errors import InputError
from pipeline.redact import one_line


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of feature vectors.

    Attributes:
        count: number of vectors.
        mean: mean, float64 [D].
        m2: sum of outer products of the deviations from the mean, float64 [D, D].
    """

    count: int
    mean: np.ndarray
    m2: np.ndarray

    def covariance(self) -> np.ndarray:
        """The unbiased covariance, float64 [D, D].

        Raises:
            InputError: there are fewer than two vectors.
        """
        if self.count < 2:
            raise InputError(f"a covariance needs at least two images, got {self.count}")
        return self.m2 / (self.count - 1)


def moments_of(features: np.ndarray) -> Moments:
    """The moments of feature vectors [N, D], N >= 1."""
    x = features.astype(np.float64)
    mean = x.mean(axis=0)
    centred = x - mean
    return Moments(len(x), mean, centred.T @ centred)


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together (Chan et al. 1983, equation 2.1). At least one part is needed."""
    return reduce(_merge, parts)


def _merge(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    delta = b.mean - a.mean
    return Moments(
        count,
        a.mean + delta * (b.count / count),
        a.m2 + b.m2 + np.outer(delta, delta) * (a.count * b.count / count),
    )


def frechet_distance(a: Moments, b: Moments) -> float:
    """The Fréchet distance ||mean_a - mean_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Dowson & Landau 1982, equation 4).

    tr (S_a S_b)^(1/2) is computed as the sum of the singular values of S_a^(1/2) S_b^(1/2). This is real, never
    negative, and exact for singular covariances, unlike a matrix square root of the product.

    Raises:
        InputError: the features differ in length, or a side has fewer than two vectors.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"features of {len(a.mean)} and {len(b.mean)} numbers: use one extractor (--features) for both sides"
        )
    covariance_a, covariance_b = a.covariance(), b.covariance()
    roots = _symmetric_sqrt(covariance_a) @ _symmetric_sqrt(covariance_b)
    cross = np.linalg.svd(roots, compute_uv=False).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return float(max(distance, 0.0))


class Statistics(NamedTuple):
    """Mean and covariance of features, and of spatial features if they are known."""

    features: Moments
    spatial: Moments | None = None


def read_statistics(uri: str) -> Statistics:
    """Reads published statistics: an npz file with `mu` [D] and `sigma` [D, D].

    Files of pytorch-fid and EDM hold only these. guided-diffusion's batches also hold images, `mu_s` and `sigma_s`.

    Raises:
        InputError: the file can't be read, or holds no statistics.
    """
    try:
        with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as file:
            features = _published(file["mu"], file["sigma"])
            return Statistics(features, _published(file["mu_s"], file["sigma_s"]) if "mu_s" in file else None)
    except Exception as error:  # zipfile, zlib and NumPy raise anything on damaged files
        if storage.is_storage_error(error):
            raise InputError(f"--reference-statistics {uri}: can't be read: {one_line(error)}") from None
        raise InputError(
            f"--reference-statistics {uri}: not an npz file with mu [D] and sigma [D, D]: {one_line(error)}"
        ) from None


def _published(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean),) * 2:
        raise ValueError(f"they are {list(mean.shape)} and {list(covariance.shape)}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("not all of the numbers are finite")
    return Moments(2, mean, covariance)  # with count 2, the covariance is m2 / 1


def write_statistics(uri: str, statistics: Statistics) -> None:
    """Writes statistics as a file for `read_statistics`."""
    buffer = io.BytesIO()
    pairs = (("", statistics.features), ("_s", statistics.spatial))
    arrays = {
        f"{name}{suffix}": value
        for suffix, moments in pairs
        if moments
        for name, value in (("mu", moments.mean), ("sigma", moments.covariance()))
    }
    np.savez(buffer, allow_pickle=False, **arrays)
    storage.write_atomic(uri, buffer.getvalue())


def _symmetric_sqrt(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    root: np.ndarray = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root
