"""The plan as read tasks: read and decode, beside the trainer that asks for it.

Free of torch: a reading process starts without the seconds that it takes.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa

from pipeline.config import ImageConfig
from pipeline.data.images import DecodeError, decode
from pipeline.data.index import DatasetIndex, Group, read_rows
from pipeline.data.order import Plan, Window, crop_place, window_rows

BLOCK_BYTES = 16 * 2**20
ROWS_PER_READ = 512, 4096
# What bridges a storage that hesitates for some steps; more would be decoded beside a run's first steps.
BATCHES_AHEAD = 8
CENTRE = (0.5, 0.5)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BYTES = 2**30


@dataclass(frozen=True)
class ReadTask:
    """A rank's rows of some windows that follow each other. Holds only what those need.

    Attributes:
        groups: the groups of the windows, by number, with the sample id of their first row.
        seed: the plan's.
        start, stop: the part of the stream that is asked for.
    """

    windows: tuple[Window, ...]
    groups: dict[int, tuple[Group, int]]
    image: ImageConfig
    seed: int
    start: int
    stop: int
    rank: int
    world_size: int
    random_crop: bool = False

    @property
    def decoded_bytes(self) -> int:
        """About what its tables hold."""
        return sum(window.rows for window in self.windows) // self.world_size * pixel_bytes(self.image)

    def __call__(self) -> Iterator[pa.Table]:
        """Tables in the plan's order: pixels, label, id, epoch, path, and bad = why it could not be decoded."""
        _keep_freed_memory()
        step = max(1, BLOCK_BYTES // pixel_bytes(self.image))
        for window in self.windows:
            encoded = self._encoded(window)
            for first in range(0, encoded.num_rows, step):
                yield self._decoded(encoded.slice(first, step))

    def _encoded(self, window: Window) -> pa.Table:
        rows = window_rows(self.seed, window, self.start, self.stop, self.rank, self.world_size)
        tables, places = [], []
        for number in np.unique(rows.group):
            here = np.flatnonzero(rows.group == number)
            group, first_id = self.groups[int(number)]
            table = read_rows(group, rows.row[here])
            tables.append(table.append_column("id", pa.array(first_id + rows.row[here])))
            places.append(here)
        if not tables:
            return pa.table({})
        table = pa.concat_tables(tables).take(np.argsort(np.concatenate(places)))
        return table.append_column("epoch", pa.array(np.full(table.num_rows, window.epoch, np.int64)))

    def _decoded(self, table: pa.Table) -> pa.Table:
        image, count = self.image, table.num_rows
        pixels = np.empty((count, image.size, image.size, image.channels), np.uint8)
        bad: list[str | None] = [None] * count
        ids, epochs = table["id"].to_pylist(), table["epoch"].to_pylist()
        for i, data in enumerate(table["bytes"].to_pylist()):
            crop = crop_place(self.seed, epochs[i], ids[i]) if self.random_crop else CENTRE
            try:
                pixels[i] = decode(data, image.size, image.channels, crop=crop)
            except DecodeError as error:
                pixels[i], bad[i] = 0, str(error)
        kind = pa.binary(pixel_bytes(image))
        packed = pa.FixedSizeBinaryArray.from_buffers(kind, count, [None, pa.py_buffer(pixels)])
        return (
            table.select(["label", "id", "epoch", "path"])
            .append_column("pixels", packed)
            .append_column("bad", pa.array(bad, pa.string()))
        )


@lru_cache(maxsize=1)
def _keep_freed_memory() -> None:
    """Keeps what images were decoded into for the next ones, for as long as the process lives.

    glibc gives large blocks back to the system, which costs a page fault for every 4 KiB of the next image: a fifth
    of the time that decoding 256x256 pixels takes. How much is kept is bounded by what one read needs.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def pixel_bytes(image: ImageConfig) -> int:
    return image.size * image.size * image.channels


def pixels_of(table: pa.Table, image: ImageConfig) -> np.ndarray:
    """The images of a table that `ReadTask` made: uint8 [N, H, W, C], not copied where it is one chunk."""
    size = pixel_bytes(image)
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * size, chunk.offset * size)
        for chunk in table["pixels"].chunks
    ]
    pixels = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return pixels.reshape(-1, image.size, image.size, image.channels)


class Reader:
    """Does read tasks, by their number, in a process that stays for all of them.

    Ray ends a worker process that was idle for a second: as Ray tasks, each would start a process anew beside a
    trainer that needs few of them.
    """

    def __init__(self, tasks: list[ReadTask]) -> None:
        self._tasks = tasks

    def __call__(self, numbers: pa.Table) -> Iterator[pa.Table]:
        for number in numbers["task"].to_pylist():
            yield from self._tasks[number]()


def rows_ahead(plan: Plan, world_size: int) -> int:
    """How many of its rows a rank should have at hand beyond those of a read."""
    return BATCHES_AHEAD * plan.batch_size // world_size


def make_read_tasks(
    index: DatasetIndex,
    plan: Plan,
    windows: list[Window],
    start: int,
    stop: int,
    rank: int,
    world_size: int,
    random_crop: bool,
) -> list[ReadTask]:
    """Cuts a run of windows into read tasks, each of some batches and about a block, and of one window at least."""
    image = replace(index.image, classes=())  # thousands of tasks would carry thousands of names
    size = pixel_bytes(image)
    tasks, some, held = list[ReadTask](), list[Window](), 0
    least, most = ROWS_PER_READ
    most = min(most, max(least, rows_ahead(plan, world_size)))

    def close() -> None:
        groups = {g: (index.groups[g], int(plan.first_id[g])) for window in some for g in window.groups}
        tasks.append(
            ReadTask(tuple(some), groups, image, plan.seed, start, stop, rank, world_size, random_crop)
        )

    for window in windows:
        rows = window.rows // world_size
        if some and (held + rows > most or (held + rows) * size > BLOCK_BYTES):
            close()
            some, held = [], 0
        some.append(window)
        held += rows
    if some:
        close()
    return tasks
