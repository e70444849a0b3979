"""Held-out bits/dim: the variational bound of a model on a dataset (Ho et al. 2020, equation 5).

Noise is a function of (seed, sample id, t). So two models of the same image size use the same noise, and their
difference is measured more precisely than either value.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.cluster.pool import Pool, in_process
from pipeline.config import ModelSpec
from pipeline.data.index import DatasetIndex
from pipeline.diffusion.losses import (
    prior_bits_per_dim,
    softmax_decoder_bits,
    stratified_vlb,
    vlb_term,
    vlb_terms,
)
from pipeline.diffusion.process import Process, make_process, q_sample, take
from pipeline.errors import InputError
from pipeline.evaluation.reading import read_images
from pipeline.evaluation.work import Partial, cut, spread_out
from pipeline.models.sampling import from_pixels
from pipeline.models.unet import UNet
from pipeline.rng import Purpose, normal, uniform

MOST_BYTES, IMAGES_AT_ONCE = 2**26, 256


@dataclass(frozen=True)
class BitsPerDim:
    """The bound, in bits/dim, averaged over images.

    Attributes:
        images: number of images.
        bits_per_dim: L_T + sum of L_{t-1} + L_0.
        stderr: its standard error over images, including the choice of terms unless all are evaluated.
        terms_stderr: the part of it that is due to the choice of terms; 0 if all terms were evaluated.
        prior: L_T.
        decoder: L_0.
        terms: L_{t-1} for t = 1..T, the first of which is L_0; empty unless all terms were evaluated.
        softmax: bits_per_dim, stderr and decoder with L_0 from `losses.softmax_decoder_bits`; None without occurring
            values.
    """

    images: int
    bits_per_dim: float
    stderr: float
    terms_stderr: float
    prior: float
    decoder: float
    terms: tuple[float, ...]
    softmax: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class BitsWork:
    """Computes the bound on each image of a task.

    Attributes:
        terms: number of the T terms evaluated for each image; 0 = all, else even.
        occurs: bool [256], values that occur in the training images (see `values_that_occur`); None = no `softmax`.
    """

    index: DatasetIndex
    model: UNet
    spec: ModelSpec
    terms: int
    seed: int
    occurs: Tensor | None = None

    def start(self, device: str) -> Callable[[np.ndarray], Partial]:
        """See `pool.Work`. Partial results are float64: total, variance, prior, decoder and softmax [N], terms [T]."""
        model, process = self.model.to(device).eval(), make_process(self.spec.diffusion).to(device)

        def do(ids: np.ndarray) -> Partial:
            images, labels = read_images(self.index, ids)
            x_0 = from_pixels(images.to(device))
            result = self._bound(
                model, process, x_0, self._labels(labels, device), torch.from_numpy(ids).to(device)
            )
            return {name: value.double().cpu().numpy() for name, value in result.items()}

        return do

    def _labels(self, labels: Tensor, device: str) -> Tensor | None:
        if not self.spec.model.class_conditional:
            return None
        return torch.where(labels < 0, len(self.spec.image.classes), labels).to(device)

    @torch.no_grad()
    def _bound(
        self, model: UNet, process: Process, x_0: Tensor, labels: Tensor | None, ids: Tensor
    ) -> dict[str, Tensor]:
        def noise(t: int | Tensor) -> Tensor:
            return normal(self.seed, t, ids, Purpose.BOUND, tuple(x_0.shape[1:]))

        first = torch.zeros_like(ids)
        x_1 = q_sample(process, x_0, first, noise(0))
        softmax = x_0.new_zeros(0)
        if self.occurs is not None:
            softmax = softmax_decoder_bits(process, x_0, x_1, self.occurs)
        if not self.terms:
            terms, prior = vlb_terms(process, model, x_0, noise, labels)
            terms, prior = terms.double(), prior.double()
            total, decoder, table = terms.sum(dim=1) + prior, terms[:, 0], terms.sum(dim=0)
            variance = torch.zeros_like(total)
        else:
            u = uniform(self.seed, 0, ids, Purpose.BOUND_TERMS, self.terms)
            total, variance = stratified_vlb(process, model, x_0, noise, u, labels)
            output = model(x_1, take(process.timesteps, first), labels)
            decoder = vlb_term(process, output, x_0, x_1, first, clip=True)
            prior, table = prior_bits_per_dim(process, x_0), total.new_zeros(0)
        return {
            "total": total, "variance": variance, "prior": prior, "decoder": decoder, "softmax": softmax, "terms": table
        }  # fmt: skip


def values_that_occur(index: DatasetIndex) -> Tensor:
    """Bool [256], True for each pixel value that occurs in a dataset, judged by up to `MOST_BYTES` of its images."""
    most = max(2, MOST_BYTES // (index.image.size**2 * index.image.channels))
    occurs = torch.zeros(256, dtype=torch.bool)
    for some in cut(spread_out(index.rows, most), IMAGES_AT_ONCE):
        occurs[read_images(index, some)[0].unique().long()] = True
    return occurs


def held_out_bits(
    model: UNet,
    spec: ModelSpec,
    index: DatasetIndex,
    ids: np.ndarray,
    *,
    terms: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    pool: Pool = in_process,
    occurs: Tensor | None = None,
) -> BitsPerDim:
    """Bits/dim of a model on the images `ids` of a dataset, conditional on their labels if the model is.

    Args:
        ids: sample ids, ascending, at least two: int64 [N].
        terms: see `BitsWork`; T or more = all.
        batch_size: images in each forward pass, and in each task.
        occurs: see `BitsWork`.

    Raises:
        InputError: the images don't fit the model, there are fewer than two, or `terms` is odd.
    """
    timesteps = spec.diffusion.timesteps
    if terms < 0 or (terms % 2 and terms < timesteps):
        raise InputError(f"--terms {terms}: give an even number, or 0 for all {timesteps} terms of the bound")
    if len(ids) < 2:
        raise InputError("bits/dim with its standard error needs at least two images")
    _check_images(spec, index)
    work = BitsWork(index, model, spec, 0 if terms >= timesteps else terms, seed, occurs)
    parts = list(pool(work, cut(ids, batch_size), "bits/dim"))
    total, variance, prior, decoder = (
        np.concatenate([part[name] for part in parts]) for name in ("total", "variance", "prior", "decoder")
    )
    count, (mean, stderr) = len(total), mean_and_error(total)
    table = np.sum([part["terms"] for part in parts], axis=0) / count
    return BitsPerDim(
        images=count,
        bits_per_dim=mean,
        stderr=stderr,
        terms_stderr=float(math.sqrt(variance.sum()) / count),
        prior=float(prior.mean()),
        decoder=float(decoder.mean()),
        terms=tuple(table.tolist()),
        softmax=None if occurs is None else _by_softmax(parts),
    )


def _by_softmax(parts: list[Partial]) -> tuple[float, float, float]:
    first = np.concatenate([part["softmax"] for part in parts])
    return (*mean_and_error(with_softmax(parts)), float(first.mean()))


def with_softmax(parts: list[Partial]) -> np.ndarray:
    """Bits/dim of each image, [N], with the softmax decoder in place of the model's own, from results of `BitsWork`."""
    return np.concatenate([part["total"] - part["decoder"] + part["softmax"] for part in parts])


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of independent values, and its standard error. At least two values are needed."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def _check_images(spec: ModelSpec, index: DatasetIndex) -> None:
    mine, theirs = spec.image, index.image
    if (mine.size, mine.channels) != (theirs.size, theirs.channels):
        raise InputError(
            f"--data {index.uri}: images of {theirs.size}x{theirs.size}x{theirs.channels}, the model's are "
            f"{mine.size}x{mine.size}x{mine.channels}: prepare the data with --image-size {mine.size} "
            f"--channels {mine.channels}"
        )
    if spec.model.class_conditional and mine.classes != theirs.classes:
        raise InputError(f"--data {index.uri}: its classes are not those that the model was trained with")
