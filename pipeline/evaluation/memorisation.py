"""Detects copies among samples, by their distances to the nearest training images, compared with held-out images."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.cluster.pool import Pool, in_process
from pipeline.data.index import DatasetIndex
from pipeline.evaluation.features import IMAGES_PER_TASK, thumbnails
from pipeline.evaluation.neighbours import squared_distances
from pipeline.evaluation.reading import read_images
from pipeline.evaluation.work import Partial, cut

QUERIES = 1000  # samples, and held-out images, to compare with all training images
NEAR = 0.01
"""Share of the held-out images below the distance that counts as a copy; it defines this distance."""


@dataclass(frozen=True)
class NearestWork:
    """Finds the image of a task that is nearest to each query.

    Attributes:
        queries: thumbnails, float32 [Q, P].
    """

    index: DatasetIndex
    queries: np.ndarray

    def start(self, device: str) -> Callable[[np.ndarray], Partial]:
        """See `pool.Work`. Partial results hold squared distances and sample ids, [Q] each."""

        def do(ids: np.ndarray) -> Partial:
            images = thumbnails(read_images(self.index, ids)[0])
            squared, nearest = np.empty(len(self.queries)), np.empty(len(self.queries), np.int64)
            for rows, distances in squared_distances(self.queries, images):
                nearest[rows] = ids[distances.argmin(axis=1)]
                squared[rows] = distances.min(axis=1)
            return {"squared": squared, "nearest": nearest}

        return do


def nearest_images(
    index: DatasetIndex, queries: np.ndarray, pool: Pool = in_process
) -> tuple[np.ndarray, np.ndarray]:
    """The image of a whole dataset that is nearest to each query.

    Args:
        queries: thumbnails, float32 [Q, P].

    Returns:
        root mean square differences of the pixels (in [0, 1]), float64 [Q], and sample ids, int64 [Q].
    """
    squared, nearest = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    for part in pool(NearestWork(index, queries), cut(np.arange(index.rows), IMAGES_PER_TASK), "nearest"):
        nearer = part["squared"] < squared
        squared[nearer], nearest[nearer] = part["squared"][nearer], part["nearest"][nearer]
    return np.sqrt(squared / queries.shape[1]), nearest


def memorised(samples: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Metrics from distances to the nearest training images.

    `memorised` is the share of samples that are as near to a training image as the nearest hundredth of the held-out
    images. It is about 0.01 for a model that copies nothing. A copy counts also if held-out images are copies too.

    Args:
        samples, held_out: distances, [N] and [M].
    """
    return {
        "nearest_training_distance": float(np.median(samples)),
        "nearest_training_distance_real": float(np.median(held_out)),
        "memorised": float((samples <= np.quantile(held_out, NEAR)).mean()),
        "memorised_images": len(samples),
    }
