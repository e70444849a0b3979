"""Reads a rank's rows in the order of its batches, in a separate process beside the trainer.

This module does not import torch, which would add seconds to the start of that process.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pipeline.data.blocks import as_row
from pipeline.data.groups import read_rows
from pipeline.data.index import DatasetIndex
from pipeline.data.order import Array, Plan, Rows, batch_rows

BLOCKS_AHEAD = 2  # blocks whose groups are read while one block is handed over
# Rows in the first block, if a batch has no more. Each block after it has twice as many, up to the most.
FIRST_ROWS = 256
THREADS = 16
_Image = tuple[bytes, int, str]  # encoded image, label, path


class RankRows:
    """Reads each of one rank's rows once. It keeps the rows of a group until the batches that need them.

    Args:
        first, last: the rank's places in each batch; see `order.cut`.
        end: number of steps in the run; nothing is read for later steps.
    """

    def __init__(self, index: DatasetIndex, plan: Plan, first: int, last: int, end: int) -> None:
        self._index, self._plan, self._first, self._last, self._end = index, plan, first, last, end
        self._open: dict[int, Future[dict[int, _Image]]] = {}
        self._pool = ThreadPoolExecutor(THREADS)

    def tables(self, start: int, stop: int, rows: int) -> Iterator[pa.Table]:
        """The rows of steps [start, stop) in order, still encoded, up to `rows` rows in a table.

        The first tables are smaller, so that the first batch need not wait for a large one. Equal arguments give equal
        tables: if the process dies, Ray Data asks another one for the tables that are missing.

        Returns:
            the columns of `read_rows`, and id and epoch (int64).
        """
        each = self._last - self._first
        sizes = _growing(max(FIRST_ROWS, each), rows)
        # Many steps are planned at once, because each plan also costs the rows that are open at both of its ends.
        steps = max(self._plan.steps_open, -(-rows // each))
        for begin in range(start, stop, steps):
            end = min(begin + steps, stop)
            ahead = min(end + self._plan.steps_open, self._end)
            planned = batch_rows(self._plan, begin, max(end, ahead), self._first, self._last)
            yield from self._tables(planned, (end - begin) * each, sizes)

    def _tables(self, planned: Rows, count: int, sizes: Iterator[int]) -> Iterator[pa.Table]:
        epoch, group, row = planned.epoch.ravel(), planned.group.ravel(), planned.row.ravel()
        owner = epoch * len(self._plan.group_rows) + group
        order = np.argsort(owner, kind="stable")
        owners, begins = np.unique(owner[order], return_index=True)
        places = dict(zip(owners.tolist(), np.split(order, begins[1:]), strict=True))

        def needed(number: int, place: int) -> Array:
            """The rows of a group that are needed from a place on."""
            here = places[number]
            return row[here[np.searchsorted(here, place) :]]

        def open_from(begin: int, stop: int) -> None:
            """Starts reading each group that first appears in [begin, stop): all its rows needed from there on."""
            for number in dict.fromkeys(owner[begin:stop].tolist()):
                if number not in self._open:
                    self._open[number] = self._pool.submit(self._read, number, needed(number, begin))

        begin = 0
        while begin < count:
            size = next(sizes)
            stop = min(begin + size, count)
            for ahead in range(BLOCKS_AHEAD + 1):
                open_from(begin + ahead * size, min(begin + (ahead + 1) * size, count))
            numbers, images = owner[begin:stop].tolist(), list[_Image]()
            found = {number: self._open[number].result() for number in set(numbers)}
            for place, number, wanted in zip(
                range(begin, stop), numbers, row[begin:stop].tolist(), strict=True
            ):
                if wanted not in found[number]:  # the group stays open beyond the steps planned at once
                    found[number] |= self._read(number, needed(number, place))
                images.append(found[number].pop(wanted))
            for number in [number for number, rest in found.items() if not rest]:
                del self._open[number]
            data, label, path = zip(*images, strict=True)
            yield pa.table(
                {
                    "bytes": _binary(data),
                    "label": pa.array(label, pa.int64()),
                    "path": pa.array(path, pa.string()),
                    "id": self._plan.first_id[group[begin:stop]] + row[begin:stop],
                    "epoch": epoch[begin:stop],
                }
            )
            begin = stop

    def _read(self, number: int, rows: Array) -> dict[int, _Image]:
        table = read_rows(self._index.groups[number % len(self._plan.group_rows)], rows)
        columns = (table[name].to_pylist() for name in ("bytes", "label", "path"))
        return dict(zip(rows.tolist(), zip(*columns, strict=True), strict=True))


def _growing(first: int, most: int) -> Iterator[int]:
    """Sizes that double from `first` to `most`, and stay there."""
    while True:
        yield min(first, most)
        first = min(2 * first, most)


def _binary(data: Sequence[bytes]) -> pa.Array:
    """A large_binary array. Its memory is allocated once; `pa.array` would move it several times as it grows."""
    ends = np.cumsum([0, *map(len, data)], dtype=np.int64)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(data), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(data))]
    )


class Read:
    """Reads spans of steps with one `RankRows`, in a process that stays for all of them.

    Args:
        data: reference to (index, plan) in Ray's object store.
        first, last, end: see `RankRows`.
        rows: rows in one block.
    """

    def __init__(self, data: Any, first: int, last: int, end: int, rows: int) -> None:
        index, plan = ray.get(data)
        self._rows, self._reader = rows, RankRows(index, plan, first, last, end)

    def __call__(self, spans: pa.Table) -> Iterator[pa.Table]:
        for start, stop in zip(*(spans[name].to_pylist() for name in ("start", "stop")), strict=True):
            yield from map(as_row, self._reader.tables(start, stop, self._rows))
