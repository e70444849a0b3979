"""Euclidean distances between many vectors, a few rows at a time."""

from collections.abc import Iterator

import numpy as np

ROWS_AT_A_TIME = 1024


def squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """||a_i - b_j||^2 for rows of `a` [N, D] against all of `b` [M, D].

    Returns:
        slices of the rows of `a` in order, and their distances, float64 [rows, M], never negative.
    """
    # About the centre the squares are smaller, and so is what cancels between them.
    centre = b.mean(axis=0, dtype=np.float64)
    b = b - centre
    b_squares = (b**2).sum(axis=1)
    for start in range(0, len(a), ROWS_AT_A_TIME):
        rows = slice(start, min(start + ROWS_AT_A_TIME, len(a)))
        part = a[rows] - centre
        distances = (part**2).sum(axis=1)[:, None] + b_squares - 2 * part @ b.T
        yield rows, distances.clip(min=0)
