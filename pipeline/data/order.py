"""Which samples form global batch k: a function of (seed, k) alone.

Every epoch the groups of rows (see `index.Group`) are shuffled and taken `groups_per_window` at a time. In a
window the rows of each group are shuffled, and dealt like cards: one from each group in turn. So every
batch mixes many groups, only one window is ever in memory, and position p of the stream belongs to rank
p mod world size: where the group count of a window is a multiple of the world size, each rank reads
whole groups that no other rank needs. Epochs follow each other without a seam or a dropped tail.

Pure numpy: no Ray, no reading.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Array = np.ndarray
# Streams of random numbers of their own, apart from those of pipeline.rng.
_SHUFFLE, _CROP = 9, 10


@dataclass(frozen=True)
class Plan:
    """The order in which a dataset is seen.

    Args:
        group_rows: rows of every group, in the dataset's own order.
        seed: of the shuffle.
        batch_size: global batch size.
        groups_per_window: groups that are mixed with each other.
    """

    group_rows: tuple[int, ...]
    seed: int
    batch_size: int
    groups_per_window: int = 16

    @cached_property
    def rows(self) -> int:
        """Samples in one epoch."""
        return sum(self.group_rows)

    @cached_property
    def first_id(self) -> Array:
        """Sample id of each group's first row, int64 [groups]."""
        return np.concatenate([[0], np.cumsum(self.group_rows)[:-1]]).astype(np.int64)


@dataclass(frozen=True)
class Window:
    """One window of one epoch: the unit of reading.

    Attributes:
        epoch: counted from 0.
        start: position in the run's stream of the window's first row.
        groups: the groups it mixes, by number.
        sizes: rows of each of them.
    """

    epoch: int
    start: int
    groups: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Samples in the window."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Rows:
    """Part of a window in the order in which it is seen: arrays of one length."""

    position: Array
    group: Array
    row: Array


def _generator(seed: int, *counter: int) -> np.random.Generator:
    sequence = np.random.SeedSequence([seed & (2**64 - 1), _SHUFFLE, *counter])
    return np.random.Generator(np.random.Philox(sequence))


def epoch_windows(plan: Plan, epoch: int) -> list[Window]:
    """The windows of an epoch, in order."""
    order = _generator(plan.seed, epoch).permutation(len(plan.group_rows))
    windows, start = [], epoch * plan.rows
    for i in range(0, len(order), plan.groups_per_window):
        groups = tuple(int(g) for g in order[i : i + plan.groups_per_window])
        windows.append(Window(epoch, start, groups, tuple(plan.group_rows[g] for g in groups)))
        start += windows[-1].rows
    return windows


def windows_between(plan: Plan, start: int, stop: int) -> Iterator[Window]:
    """The windows that hold the stream's positions [start, stop), in order, one epoch at a time in memory."""
    if start >= stop:
        return
    for epoch in range(start // plan.rows, (stop - 1) // plan.rows + 1):
        for window in epoch_windows(plan, epoch):
            if window.start < stop and window.start + window.rows > start:
                yield window


def window_rows(seed: int, window: Window, start: int, stop: int, rank: int, world_size: int) -> Rows:
    """What `rank` sees of a window between the stream's positions [start, stop), in order; `seed` is the plan's."""
    sized = zip(window.groups, window.sizes, strict=True)
    row = np.concatenate([_generator(seed, window.epoch, g).permutation(n) for g, n in sized])
    turn = np.concatenate([np.arange(n) for n in window.sizes])
    group = np.repeat(np.array(window.groups, dtype=np.int64), window.sizes)
    dealt = np.argsort(turn, kind="stable")
    position = window.start + np.arange(window.rows, dtype=np.int64)
    mine = (position >= start) & (position < stop) & (position % world_size == rank)
    return Rows(position[mine], group[dealt][mine], row[dealt][mine])


def local_batch_size(plan: Plan, step: int, rank: int, world_size: int) -> int:
    """How many samples of global batch `step` belong to `rank`."""
    first, last = step * plan.batch_size, (step + 1) * plan.batch_size

    def below(position: int) -> int:
        return (position - rank + world_size - 1) // world_size

    return below(last) - below(first)


def crop_place(seed: int, epoch: int, sample_id: int) -> tuple[float, float]:
    """Where a sample's random crop lies, from 0 to 1 in x and y: a function of (seed, epoch, sample id) alone.

    Numpy's counter-based generator: pipeline.rng needs torch, which a reading process does without.
    """
    key = [seed & (2**64 - 1), _CROP]
    x, y = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, epoch, sample_id])).random(2)
    return float(x), float(y)
