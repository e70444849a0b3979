"""Cuts sets of sample ids into tasks for a pool (cluster/pool.py).

The cut depends only on the ids, not on the pool, and partial results are merged in the order of the tasks. So the
merged result is the same for any pool.
"""

import numpy as np
import torch

from pipeline.rng import Choice, Purpose, uniform

Partial = dict[str, np.ndarray]


def choose(rows: int, limit: int, seed: int, use: Choice) -> np.ndarray:
    """`limit` of the ids 0..rows-1, or all if `limit` is 0, as a function of (seed, rows, use): int64, ascending."""
    if not 0 < limit < rows:
        return np.arange(rows)
    draws = uniform(seed, use, torch.arange(rows), Purpose.IMAGES)[:, 0]
    return np.sort(draws.argsort(stable=True)[:limit].numpy())


def spread_out(count: int, most: int) -> np.ndarray:
    """At most `most` evenly spaced places in `range(count)`, which suits data that may be sorted: int64."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def cut(ids: np.ndarray, size: int) -> list[np.ndarray]:
    """Cuts ids into tasks of `size`; the last may be shorter."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]
