"""From the plan to a rank's batches: Ray Data reads, the trainer's own threads decode.

Encoded bytes travel through the object store; an image is decoded only beside the trainer that uses it.
One Ray Data execution spans many epochs, since each start of one costs seconds.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pyarrow as pa
import ray.data
import torch
from torch import Tensor

from pipeline.data.images import DecodeError, decode
from pipeline.data.index import DatasetIndex
from pipeline.data.plan import Plan, local_batch_size, windows_between
from pipeline.data.reads import PlannedReads, Read

WINDOWS_PER_EXECUTION = 4096
READS_AT_ONCE = 2


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N]; -1 where the data has none.
        ids: sample ids, int64 [N].
        epochs: the epoch of each sample, int64 [N].
        weights: float32 [N]; 0 for an image that could not be decoded, else 1.
        bad: "path: reason" of each image that could not be decoded.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    epochs: Tensor
    weights: Tensor
    bad: tuple[str, ...] = ()

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for copies to a GPU that overlap with compute."""
        names = ("images", "labels", "ids", "epochs", "weights")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})


@dataclass(frozen=True)
class RankStream:
    """What one rank of `world_size` sees of the plan: small, travels to the rank by pickle."""

    index: DatasetIndex
    plan: Plan
    rank: int
    world_size: int
    decode_threads: int = 1

    def batches(
        self, start_step: int, stop_step: int, prefetch: int = 2, pin: bool = False
    ) -> Iterator[Batch]:
        """This rank's part of the global batches [start_step, stop_step), `prefetch` of them decoded ahead."""

        def produce() -> Iterator[Batch]:
            with ThreadPoolExecutor(self.decode_threads) as pool:
                tables = self._tables(start_step * self.plan.batch_size, stop_step * self.plan.batch_size)
                sizes = (
                    local_batch_size(self.plan, s, self.rank, self.world_size)
                    for s in range(start_step, stop_step)
                )
                for table in _rebatch(tables, sizes):
                    batch = self._decode(table, pool)
                    yield batch.pin_memory() if pin else batch

        return _ahead(produce, prefetch)

    def _tables(self, start: int, stop: int) -> Iterator[pa.Table]:
        windows = windows_between(self.plan, start, stop)
        while some := list(islice(windows, WINDOWS_PER_EXECUTION)):
            reads = [Read(self.index, self.plan, w, start, stop, self.rank, self.world_size) for w in some]
            # No CPU is asked for: reading waits on storage, and the trainers may hold every CPU there is.
            dataset = ray.data.read_datasource(
                PlannedReads(reads), ray_remote_args={"num_cpus": 0}, concurrency=READS_AT_ONCE
            )
            dataset.context.execution_options.preserve_order = True
            dataset.context.enable_progress_bars = False
            yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)

    def _decode(self, table: pa.Table, pool: ThreadPoolExecutor) -> Batch:
        image = self.index.image
        shape = (table.num_rows, image.size, image.size, image.channels)
        pixels, weights = np.zeros(shape, np.uint8), np.ones(table.num_rows, np.float32)
        encoded, bad = table["bytes"], list[str]()

        def decode_one(i: int) -> None:
            try:
                pixels[i] = decode(encoded[i].as_py(), image.size, image.channels)
            except DecodeError as error:
                weights[i] = 0.0
                bad.append(f"{table['path'][i].as_py()}: {error}")

        list(pool.map(decode_one, range(table.num_rows)))
        return Batch(
            images=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
            labels=torch.from_numpy(table["label"].to_numpy().copy()),
            ids=torch.from_numpy(table["id"].to_numpy().copy()),
            epochs=torch.from_numpy(table["epoch"].to_numpy().copy()),
            weights=torch.from_numpy(weights),
            bad=tuple(sorted(bad)),
        )


def _rebatch(tables: Iterator[pa.Table], sizes: Iterator[int]) -> Iterator[pa.Table]:
    """Cuts a stream of tables into tables of the given sizes; stops when either ends."""
    buffered: pa.Table | None = None
    for size in sizes:
        while buffered is None or buffered.num_rows < size:
            more = next(tables, None)
            if more is None:
                return
            buffered = more if buffered is None else pa.concat_tables([buffered, more])
        yield buffered.slice(0, size)
        buffered = buffered.slice(size)


def _ahead(produce: Callable[[], Iterator[Batch]], depth: int) -> Iterator[Batch]:
    """Runs an iterator in a thread from now on, at most `depth` items ahead, until the consumer closes it."""
    items: queue.Queue[Batch | Exception | None] = queue.Queue(maxsize=max(depth, 1))
    stopped = threading.Event()

    def put(item: Batch | Exception | None) -> None:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def run() -> None:
        try:
            for item in produce():
                put(item)
                if stopped.is_set():
                    return
            put(None)
        except Exception as error:  # handed to the consumer, who raises it
            put(error)

    def consume() -> Iterator[Batch]:
        try:
            while (item := items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stopped.set()

    threading.Thread(target=run, name="decode-ahead", daemon=True).start()
    return consume()
