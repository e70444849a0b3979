"""The kernel inception distance: unbiased MMD^2 with a cubic kernel (Bińkowski et al. 2018)."""

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.rng import Purpose, uniform

LEAST_SUBSETS = 10
LEAST_IMAGES = 2 * LEAST_SUBSETS


def kernel_distance(
    real: np.ndarray, fake: np.ndarray, *, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float, int]:
    """The kernel inception distance, its standard error, and the number of images of each side that it covers.

    Both sides are shuffled and cut into disjoint subsets. Each pair of subsets gives one `squared_mmd`, and their
    mean is the distance. Disjoint subsets are independent, so the standard error of the mean is that of the distance.
    Overlapping subsets, as commonly used, would make it look smaller than it is.

    Args:
        real, fake: features, [N, D] and [M, D].
        subset_size: vectors of each side in a subset; fewer if there would be less than ten subsets.
        seed: seed of the shuffle. The members of a subset are a function of (seed, N, M).

    Returns:
        the mean over the subsets, its standard error, and the images of a side in all subsets, without the rest that
        does not fill a subset. For equal distributions the expected value is 0, so estimates may be negative.

    Raises:
        InputError: the features differ in length, or a side has fewer than twenty vectors.
    """
    if real.shape[1] != fake.shape[1]:
        raise InputError(
            f"features of {real.shape[1]} and {fake.shape[1]} numbers: use one extractor for both"
        )
    least = min(len(real), len(fake))
    size = min(subset_size, least // LEAST_SUBSETS)
    if size < 2:
        raise InputError(
            f"the kernel distance needs at least {LEAST_IMAGES} images on each side, got {least}"
        )
    real_order, fake_order = _shuffled(len(real), seed, 0), _shuffled(len(fake), seed, 1)
    estimates = [
        squared_mmd(real[real_order[start : start + size]], fake[fake_order[start : start + size]])
        for start in range(0, least - size + 1, size)
    ]
    stderr = np.std(estimates, ddof=1) / np.sqrt(len(estimates))
    return float(np.mean(estimates)), float(stderr), size * len(estimates)


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of MMD^2 with the kernel (x . y / D + 1)^3 (Gretton et al. 2012, equation 3).

    Args:
        x, y: [N, D] and [M, D], at least two rows each.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    n, m = len(x), len(y)
    k_xx, k_yy, k_xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    within_x = (k_xx.sum() - np.trace(k_xx)) / (n * (n - 1))
    within_y = (k_yy.sum() - np.trace(k_yy)) / (m * (m - 1))
    return float(within_x + within_y - 2 * k_xy.mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    values: np.ndarray = (x @ y.T / x.shape[1] + 1) ** 3
    return values


def _shuffled(count: int, seed: int, side: int) -> np.ndarray:
    draws = uniform(seed, side, torch.arange(count), Purpose.KERNEL_SUBSETS)[:, 0]
    order: np.ndarray = draws.argsort(stable=True).numpy()
    return order
