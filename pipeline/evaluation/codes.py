"""Bits/dim of simple codes without a network, as baselines for a model's bits/dim."""

import lzma

import numpy as np

from pipeline.data.images import encode_png
from pipeline.diffusion.losses import UNSEEN

LEVELS = 256
MOST_BYTES = 2**28
"""Most bytes of training images for the histograms."""
_POSITIONS_TOGETHER = 4096


def trivial_codes(train: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """Bits/dim of images under codes without a network.

    uniform: all values that occur in the training images cost the same.
    histogram: the cost of a value follows from its frequency among all training values.
    position_histogram: the same, separately for each pixel and channel.
    png: each image as a PNG file. xz: all images, concatenated.

    A histogram adds one to the count of each value that occurs, and leaves the share UNSEEN to all 256 values.
    Args:
        train, images: uint8, [M, H, W, C] and [N, H, W, C].
    """
    flat_train, flat = train.reshape(len(train), -1), images.reshape(len(images), -1)
    counts = np.bincount(flat_train.reshape(-1), minlength=LEVELS)
    occurs = counts > 0
    positions = np.zeros(len(flat), np.float64)
    for start in range(0, flat.shape[1], _POSITIONS_TOGETHER):
        columns = slice(start, start + _POSITIONS_TOGETHER)
        positions += _by_position(flat_train[:, columns], flat[:, columns], occurs)
    return {
        "uniform": float(_cost(occurs.astype(np.int64), occurs)[flat].mean()),
        "histogram": float(_cost(counts, occurs)[flat].mean()),
        "position_histogram": float(positions.mean() / flat.shape[1]),
        "png": 8 * sum(len(encode_png(image)) for image in images) / images.size,
        "xz": 8 * len(lzma.compress(images.tobytes(), preset=9)) / images.size,
    }


def _cost(counts: np.ndarray, occurs: np.ndarray) -> np.ndarray:
    """Bits of each value from its count: [..., 256]."""
    smoothed = np.where(occurs, counts + 1, 0)
    share = smoothed / smoothed.sum(axis=-1, keepdims=True)
    bits: np.ndarray = -np.log2((1 - UNSEEN) * share + UNSEEN / LEVELS)
    return bits


def _by_position(train: np.ndarray, values: np.ndarray, occurs: np.ndarray) -> np.ndarray:
    """Bits of each row of `values` [N, P], with one histogram for each column of `train`: [N]."""
    columns = np.arange(train.shape[1])
    counts = np.zeros((len(columns), LEVELS), np.int64)
    for row in train:
        counts[columns, row] += 1
    cost = _cost(counts, occurs)
    total: np.ndarray = np.array([cost[columns, row].sum() for row in values])
    return total
