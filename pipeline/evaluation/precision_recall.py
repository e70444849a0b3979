"""Improved precision and recall (Kynkäänniemi et al. 2019)."""

import numpy as np

from pipeline.errors import InputError
from pipeline.evaluation.distances import squared_distances


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """How much of what is generated is real, and how much of what is real is generated.

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest
    neighbour in the set (equation 1). Precision is the share of `fake` inside the manifold of `real`, recall
    the share of `real` inside that of `fake` (equation 2).

    Args:
        real, fake: features, [N, D] and [M, D].

    Raises:
        InputError: a side has no k neighbours.
    """
    real_radii, fake_radii = _squared_radii(real, k), _squared_radii(fake, k)
    fake_inside, real_inside = np.zeros(len(fake), bool), np.zeros(len(real), bool)
    for rows, distances in squared_distances(fake, real):
        fake_inside[rows] = (distances <= real_radii).any(axis=1)
        real_inside |= (distances <= fake_radii[rows, None]).any(axis=0)
    return float(fake_inside.mean()), float(real_inside.mean())


def _squared_radii(points: np.ndarray, k: int) -> np.ndarray:
    if len(points) <= k:
        raise InputError(
            f"precision and recall with k = {k} need more than {k} images a side, got {len(points)}"
        )
    radii = np.empty(len(points))
    for rows, distances in squared_distances(points, points):
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = np.inf
        radii[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii
