"""Work that is cut into tasks, and run here or by many actors (see distributed.py) with the same result.

A task is an array of sample ids; how a set of ids is cut into tasks depends on the ids alone, never on who runs
them, and the partial results come back in the tasks' order. So the merged result is the same for any pool.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from pipeline.rng import Purpose, uniform

Partial = dict[str, np.ndarray]


class Work(Protocol):
    """What to do with a task; travels to whoever does it by pickle, within the job."""

    def start(self, device: torch.device) -> Callable[[np.ndarray], Partial]:
        """Sets up on a device, once, and returns the function that does one task."""


class Pool(Protocol):
    """Does all tasks and yields their partial results in order."""

    def __call__(self, work: Work, tasks: Sequence[np.ndarray], title: str = "") -> Iterator[Partial]: ...


def in_process(work: Work, tasks: Sequence[np.ndarray], title: str = "") -> Iterator[Partial]:
    """Does the tasks one after the other in this process, on the CPU."""
    yield from map(work.start(torch.device("cpu")), tasks)


def choose(rows: int, limit: int, seed: int) -> np.ndarray:
    """`limit` of the ids 0..rows-1 (all where `limit` is 0), a function of (seed, rows): int64, ascending."""
    if not 0 < limit < rows:
        return np.arange(rows)
    draws = uniform(seed, 0, torch.arange(rows), Purpose.EVALUATION)[:, 0]
    return np.sort(draws.argsort(stable=True)[:limit].numpy())


def cut(ids: np.ndarray, size: int) -> list[np.ndarray]:
    """Tasks of `size` ids, the last one shorter."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]
