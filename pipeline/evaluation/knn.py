"""Do class-conditional samples look like the class that was asked for? Real images vote."""

import numpy as np

from pipeline.errors import InputError
from pipeline.evaluation.distances import squared_distances


def knn_label_accuracy(
    reference: np.ndarray, reference_labels: np.ndarray, queries: np.ndarray, labels: np.ndarray, k: int = 5
) -> float:
    """The share of `queries` that their k nearest neighbours in `reference` take for their label.

    The neighbours vote; of classes with equal votes the one whose voters rank nearer wins.

    Args:
        reference, queries: vectors, [N, D] and [M, D].
        reference_labels, labels: int64, [N] and [M], from 0.

    Raises:
        InputError: fewer than k reference vectors.
    """
    if len(reference) < k:
        raise InputError(f"{k} nearest neighbours need at least {k} real images, got {len(reference)}")
    classes = int(reference_labels.max()) + 1
    # Each vote counts one and a bit more the nearer it is; all the bits together are less than a vote.
    weights = 1 + (k - np.arange(k)) / (k * (k + 1))
    right = 0
    for rows, distances in squared_distances(queries, reference):
        nearest = np.argpartition(distances, k - 1, axis=1)[:, :k]
        order = np.take_along_axis(distances, nearest, axis=1).argsort(axis=1, kind="stable")
        voters = reference_labels[np.take_along_axis(nearest, order, axis=1)]
        votes = (np.eye(classes)[voters] * weights[:, None]).sum(axis=1)
        right += int((votes.argmax(axis=1) == labels[rows]).sum())
    return right / len(queries)
