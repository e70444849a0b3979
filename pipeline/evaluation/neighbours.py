"""Nearest-neighbour metrics: precision and recall of features, and how well samples match their class."""

from collections.abc import Iterator

import numpy as np

from pipeline.errors import InputError

ROWS_AT_A_TIME = 1024
ROUNDING = 1e-12
"""Share of the squares of two vectors below which their squared distance is only rounding."""


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """How realistic samples are, and how much of the real data they cover (Kynkäänniemi et al. 2019).

    A set's manifold is the union of balls around its points, each with the radius to the point's k-th nearest
    neighbour in the set (equation 1). Precision is the share of `fake` inside the manifold of `real`. Recall is the
    share of `real` inside the manifold of `fake` (equation 2).

    Args:
        real, fake: features, [N, D] and [M, D].

    Raises:
        InputError: a side has too few vectors for k neighbours.
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
            f"precision and recall with k = {k} need more than {k} images on each side, got {len(points)}"
        )
    radii = np.empty(len(points))
    for rows, distances in squared_distances(points, points):
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = np.inf
        radii[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii


def knn_label_accuracy(
    reference: np.ndarray, reference_labels: np.ndarray, queries: np.ndarray, labels: np.ndarray, k: int = 5
) -> float:
    """The share of `queries` whose k nearest neighbours in `reference` vote for the query's own label.

    It tells whether class-conditional samples look like their class. Of classes with equal votes, the one with the
    nearer voters wins.

    Args:
        reference, queries: vectors, [N, D] and [M, D].
        reference_labels, labels: int64, [N] and [M], from 0.

    Raises:
        InputError: there are fewer than k reference vectors.
    """
    if len(reference) < k:
        raise InputError(f"{k} nearest neighbours need at least {k} real images, got {len(reference)}")
    classes = int(reference_labels.max()) + 1
    # Each vote counts one, plus a bonus that is larger for nearer voters. All bonuses together are less than one.
    weights = 1 + (k - np.arange(k)) / (k * (k + 1))
    right = 0
    for rows, distances in squared_distances(queries, reference):
        nearest = np.argpartition(distances, k - 1, axis=1)[:, :k]
        order = np.take_along_axis(distances, nearest, axis=1).argsort(axis=1, kind="stable")
        voters = reference_labels[np.take_along_axis(nearest, order, axis=1)]
        votes = (np.eye(classes)[voters] * weights[:, None]).sum(axis=1)
        right += int((votes.argmax(axis=1) == labels[rows]).sum())
    return right / len(queries)


def squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances ||a_i - b_j||^2 of rows of `a` [N, D] to all rows of `b` [M, D].

    Returns:
        slices of rows of `a` in order, each with its distances, float64 [rows, M], never negative, and exactly 0
        between equal rows.
    """
    # Subtracting the centre makes the squares smaller, and so the cancellation between them.
    centre = b.mean(axis=0, dtype=np.float64)
    b = b - centre
    b_squares = (b**2).sum(axis=1)
    for start in range(0, len(a), ROWS_AT_A_TIME):
        rows = slice(start, min(start + ROWS_AT_A_TIME, len(a)))
        part = a[rows] - centre
        squares = (part**2).sum(axis=1)[:, None] + b_squares
        distances = squares - 2 * part @ b.T
        distances[distances < ROUNDING * squares] = 0
        yield rows, distances
