"""Sets of sample ids as tasks for a pool (cluster/pool.py).

How a set is cut depends on the ids alone, never on who does the tasks, and their partial results are merged in the
tasks' order. So the merged result is the same for any pool.
"""

import numpy as np
import torch

from pipeline.rng import Choice, Purpose, uniform

Partial = dict[str, np.ndarray]


def choose(rows: int, limit: int, seed: int, use: Choice) -> np.ndarray:
    """`limit` of the ids 0..rows-1 (all where `limit` is 0), a function of (seed, rows, use): int64, ascending."""
    if not 0 < limit < rows:
        return np.arange(rows)
    draws = uniform(seed, use, torch.arange(rows), Purpose.IMAGES)[:, 0]
    return np.sort(draws.argsort(stable=True)[:limit].numpy())


def spread_out(count: int, most: int) -> np.ndarray:
    """At most `most` places in `range(count)`, evenly spaced, since data may be sorted."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def cut(ids: np.ndarray, size: int) -> list[np.ndarray]:
    """Tasks of `size` ids, the last one shorter."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]
