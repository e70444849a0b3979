"""Decides which samples form global batch k: a function of (seed, k) alone, whatever the number of ranks.

In every epoch the groups of rows (see `groups.Group`) are shuffled into one line. The line is cut into equal
stretches, the plan's *lanes*. Batch k takes the same number of rows from every lane. The batch is ordered by lane and
cut among the ranks at floor(r * batch / world). So each rank reads its own stretch of the line, and only the groups
at the ends of a stretch are read by two ranks.

Within a lane, a row is drawn from a buffer of the groups around it. If groups can only be read whole, even lanes run
forwards and odd lanes backwards. A group that a lane boundary divides is then open in both lanes at the same time,
and a rank that has both lanes reads it once.

The lanes of an epoch differ in length by at most one row, and the next epoch's rows follow without a gap, so no epoch
drops a tail. Which lane gets an extra row changes from epoch to epoch. Lane l has held floor((N + l) / L) of the
first N rows of all L lanes, and these counts sum to N (Hermite's identity).

This module is pure numpy: it neither reads data nor imports Ray.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

Array = np.ndarray
# Separate streams of random numbers, apart from those of pipeline.rng.
_SHUFFLE, _CROP, _PLACE = 9, 10, 11
# Most encoded bytes in the open groups of all lanes: OPEN_BYTES, or 1/OPEN_SHARE of the data if that is more, because
# the ranks share the memory and large data has many ranks.
OPEN_BYTES, OPEN_SHARE = 2**30, 256
OPEN_GROUPS = 2  # groups that a lane usually has open, partly used
# Row groups of prepared data are sized so that LANES lanes fit into memory with GROUPS_PER_LANE groups each. Small
# data gets at least LEAST_ROWS rows a group, because each group costs time and a place in the file's footer.
LANES, GROUPS_PER_LANE, LEAST_ROWS = 1024, 10, 16
SMALL_GROUPS = 4  # groups in a buffer, where the images of a group could be read one by one


@dataclass(frozen=True, eq=False)
class Plan:
    """The order in which a run reads a dataset.

    Args:
        group_rows: rows of every group, at least 1 each, in the dataset's own order, int [groups].
        seed: seed of the shuffle.
        batch_size: global batch size.
        lanes: number of lanes; it divides the batch size. See `lanes_for`.
        whole: True if a group can only be read whole.
    """

    group_rows: Array
    seed: int
    batch_size: int
    lanes: int
    whole: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "group_rows", np.asarray(self.group_rows, np.int64))

    @cached_property
    def rows(self) -> int:
        """Samples in one epoch."""
        return int(self.group_rows.sum())

    @cached_property
    def first_id(self) -> Array:
        """Sample id of each group's first row, int64 [groups]."""
        return np.cumsum(self.group_rows) - self.group_rows

    def ids(self, rows: "Rows") -> Array:
        """Sample ids of rows, int64 [steps, places in the batch]."""
        ids: Array = self.first_id[rows.group] + rows.row
        return ids

    @cached_property
    def buffer(self) -> int:
        """Rows by which a lane's groups reach into the next: the mean group, or some groups where they are small."""
        return max(1, self.rows // len(self.group_rows)) * (1 if self.whole else SMALL_GROUPS)

    @cached_property
    def steps_open(self) -> int:
        """Approximate number of steps within which a group is used up."""
        in_lane = min(int(self.group_rows.max()), self.rows // self.lanes + 1)
        return 1 + (2 * in_lane + self.buffer) * self.lanes // self.batch_size


@dataclass(frozen=True)
class Rows:
    """Rows of some batches: epoch, group and row in the group, each int64 [steps, places in the batch]."""

    epoch: Array
    group: Array
    row: Array


@dataclass(frozen=True)
class _Line:
    """An epoch's groups in their order, and how they are cut into lanes.

    Attributes:
        groups: numbers of the groups, int64 [groups].
        starts: place of each group's first row in the line, and the end: int64 [groups + 1].
        lanes: place of each lane's first row in the line, and the end: int64 [lanes + 1].
        key: key of the random numbers that draw rows from the buffer in this epoch.
    """

    groups: Array
    starts: Array
    lanes: Array
    key: np.uint64


def lanes_for(groups: int, size: int, batch_size: int) -> int:
    """The largest number of lanes whose open groups fit into memory. With more lanes, more ranks read without overlap.

    Args:
        groups: number of groups in the dataset.
        size: size of all its encoded images, in bytes.
        batch_size: global batch size; the result divides it.
    """
    room = _room(size)
    most = batch_size if size <= room else room * groups // (OPEN_GROUPS * size)
    return max(
        lanes for lanes in range(1, batch_size + 1) if not batch_size % lanes and lanes <= max(1, most)
    )


def rows_per_group(rows: int, size: int) -> int:
    """Rows that a row group of prepared data should have, a power of two; see `LANES`.

    Args:
        rows: images in the dataset.
        size: size of all its encoded images, in bytes.
    """
    by_bytes = rows * _room(size) // (OPEN_GROUPS * LANES * max(1, size))
    most = max(1, min(by_bytes, max(LEAST_ROWS, rows // (GROUPS_PER_LANE * LANES))))
    return 2 ** (most.bit_length() - 1)


def _room(size: int) -> int:
    """Memory for the open groups of all lanes, in bytes."""
    return max(OPEN_BYTES, size // OPEN_SHARE)


def cut(batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """A rank's places in every global batch, as [first, end)."""
    return rank * batch_size // world_size, (rank + 1) * batch_size // world_size


def batch_rows(plan: Plan, start: int, stop: int, first: int = 0, last: int | None = None) -> Rows:
    """The rows of global batches [start, stop) at places [first, last), in order.

    The cost grows with the rows asked for, plus the rows of the groups that are open at both ends. It does not depend
    on how far into the run they are.
    """
    last = plan.batch_size if last is None else last
    each, shape = plan.batch_size // plan.lanes, (stop - start, last - first)
    rows = Rows(*(np.empty(shape, np.int64) for _ in range(3)))
    lanes = np.arange(first // each, -(-last // each))
    epoch = max(0, start * plan.batch_size // plan.rows - 1)
    while len(lanes):
        began, ended = ((n * plan.rows + lanes) // plan.lanes for n in (epoch, epoch + 1))
        if (began >= stop * each).all():
            break
        low, high = (np.clip(step * each, began, ended) - began for step in (start, stop))
        some = low < high
        if some.any():
            lane, at, group, row = _lane_rows(plan, epoch, lanes[some], low[some], high[some])
            step, place = np.divmod(at + (epoch * plan.rows + lane) // plan.lanes, each)
            place += lane * each
            mine = (place >= first) & (place < last)
            where = step[mine] - start, place[mine] - first
            rows.epoch[where], rows.group[where], rows.row[where] = epoch, group[mine], row[mine]
        epoch += 1
    return rows


def _lane_rows(
    plan: Plan, epoch: int, lanes: Array, low: Array, high: Array
) -> tuple[Array, Array, Array, Array]:
    """Lane, place in the lane, group and row of what some lanes of an epoch hold at the places [low, high).

    Each row draws a number uniformly from its group's stretch of the lane plus one buffer. The lane is sorted by
    these numbers. So the row at a place comes from a group within one buffer of the group that was there before.
    """
    line = _line(plan, epoch)
    left, right, forward = line.lanes[lanes], line.lanes[lanes + 1], (lanes % 2 == 0) | (not plan.whole)
    first = np.where(forward, left + low, right - high)
    last = np.where(forward, left + high, right - low) - 1

    def starts_at(place: Array) -> Array:
        return np.maximum(line.starts[_group_at(line, place)], left)

    def ends_at(place: Array) -> Array:
        return np.minimum(line.starts[_group_at(line, place) + 1], right)

    first = starts_at(np.maximum(starts_at(first) - plan.buffer, left))
    end = ends_at(np.minimum(ends_at(last) + plan.buffer, right) - 1)
    count = end - first
    lane = np.repeat(np.arange(len(lanes)), count)
    turn = np.arange(len(lane)) - np.repeat(np.cumsum(count) - count, count)
    place = first[lane] + turn
    number = _group_at(line, place)
    from_, to = np.maximum(line.starts[number], left[lane]), np.minimum(line.starts[number + 1], right[lane])
    begins = np.where(forward[lane], from_ - left[lane], right[lane] - to)
    drawn = begins + _uniform(line.key, place) * (to - from_ + plan.buffer)
    order = np.lexsort((drawn, lane))
    at = np.where(forward, first - left, right - end)[lane] + turn
    wanted = (at >= low[lane]) & (at < high[lane])
    order, lane, at = order[wanted], lane[wanted], at[wanted]
    return lanes[lane], at, line.groups[number[order]], (place - line.starts[number])[order]


def _group_at(line: _Line, place: Array) -> Array:
    return np.searchsorted(line.starts, place, side="right") - 1


@lru_cache(maxsize=3)
def _line(plan: Plan, epoch: int) -> _Line:
    groups = _generator(plan.seed, epoch).permutation(len(plan.group_rows))
    starts = np.concatenate([[0], np.cumsum(plan.group_rows[groups])])
    lanes = np.arange(plan.lanes)
    began, ended = ((n * plan.rows + lanes) // plan.lanes for n in (epoch, epoch + 1))
    key = _generator(plan.seed, epoch, _PLACE).integers(2**64, dtype=np.uint64)
    return _Line(groups, starts, np.concatenate([[0], np.cumsum(ended - began)]), key)


def _generator(seed: int, *counter: int) -> np.random.Generator:
    sequence = np.random.SeedSequence([seed & (2**64 - 1), _SHUFFLE, *counter])
    return np.random.Generator(np.random.Philox(sequence))


def _uniform(key: np.uint64, counter: Array) -> Array:
    """Random numbers in [0, 1) at any places of a stream: SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        word = key + (counter.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
    return (word >> np.uint64(11)) * 2.0**-53


def crop_place(seed: int, epoch: int, sample_id: int) -> tuple[float, float]:
    """Place of a sample's random crop, from 0 to 1 in x and y: a function of (seed, epoch, sample id) alone.

    This uses numpy's counter-based generator, because pipeline.rng needs torch and reading processes don't import it.
    """
    key = [seed & (2**64 - 1), _CROP]
    x, y = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, epoch, sample_id])).random(2)
    return float(x), float(y)
