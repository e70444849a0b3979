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
_SHUFFLE = 9  # the stream of random numbers that orders the data; apart from those of pipeline.rng


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
    """

    epoch: int
    start: int
    rows: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Part of a window in the order in which it is seen: arrays of one length."""

    position: Array
    group: Array
    row: Array


def _generator(plan: Plan, *counter: int) -> np.random.Generator:
    sequence = np.random.SeedSequence([plan.seed & (2**64 - 1), _SHUFFLE, *counter])
    return np.random.Generator(np.random.Philox(sequence))


def epoch_windows(plan: Plan, epoch: int) -> list[Window]:
    """The windows of an epoch, in order."""
    order = _generator(plan, epoch).permutation(len(plan.group_rows))
    windows, start = [], epoch * plan.rows
    for i in range(0, len(order), plan.groups_per_window):
        groups = tuple(int(g) for g in order[i : i + plan.groups_per_window])
        rows = sum(plan.group_rows[g] for g in groups)
        windows.append(Window(epoch, start, rows, groups))
        start += rows
    return windows


def windows_between(plan: Plan, start: int, stop: int) -> Iterator[Window]:
    """The windows that hold the stream's positions [start, stop), in order, one epoch at a time in memory."""
    if start >= stop:
        return
    for epoch in range(start // plan.rows, (stop - 1) // plan.rows + 1):
        for window in epoch_windows(plan, epoch):
            if window.start < stop and window.start + window.rows > start:
                yield window


def window_rows(plan: Plan, window: Window, start: int, stop: int, rank: int, world_size: int) -> Rows:
    """What `rank` sees of a window between the stream's positions [start, stop), in order."""
    sizes = [plan.group_rows[g] for g in window.groups]
    row = np.concatenate(
        [_generator(plan, window.epoch, g).permutation(n) for g, n in zip(window.groups, sizes, strict=True)]
    )
    turn = np.concatenate([np.arange(n) for n in sizes])
    group = np.repeat(np.array(window.groups, dtype=np.int64), sizes)
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
