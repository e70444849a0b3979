"""Turns the plan into a rank's batches. Ray Data reads and decodes beside the trainer, which only copies.

Encoded bytes travel from storage to the node of the trainer that uses them and are decoded there, in separate
processes. So pixels never cross the network, and decoding does not hold Python's lock in the trainer. One Ray Data
execution covers a whole run, because each start of one costs seconds.
"""

import gc
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.train import DataConfig

from pipeline.cluster.pace import blocks_of, set_in_flight, set_pace
from pipeline.config import ImageConfig
from pipeline.data.blocks import BATCHES_AHEAD, BLOCK_BYTES, Decode, block_rows, pixel_bytes, tables_of
from pipeline.data.index import DatasetIndex
from pipeline.data.order import Plan, cut
from pipeline.data.reads import Read

if TYPE_CHECKING:
    from pipeline.data.batch import Batch

IN_FLIGHT_BYTES = 8 * BLOCK_BYTES
CONSUMER_TABLES = 4
# A reading process that dies repeats at most one span of steps: 1/SPANS of the run, or SPAN_BLOCKS blocks if more.
# A start puts each span into the object store, which takes about a millisecond of CPU time.
SPANS, SPAN_BLOCKS = 200, 64
CLOSING_SECONDS = 30.0


@dataclass(frozen=True)
class PlannedIndex:
    """A dataset and its plan, stored once in Ray's object store for all ranks. This handle is small to pickle.

    Attributes:
        data: reference to (index, plan).
        image: size and channels, without class names.
        image_bytes: mean size of an encoded image, in bytes.
        batch_size: global batch size.
        seed: seed of the plan.
    """

    data: Any
    image: ImageConfig
    image_bytes: int
    batch_size: int
    seed: int


def share(index: DatasetIndex, plan: Plan) -> PlannedIndex:
    """Puts a dataset and its plan into Ray's object store, for as long as this process lives."""
    image = replace(index.image, classes=())  # may be thousands of names
    mean = index.bytes // max(1, index.rows)
    return PlannedIndex(ray.put((index, plan)), image, mean, plan.batch_size, plan.seed)


@dataclass(frozen=True)
class RankStream:
    """One rank's part of the plan, as a handle that is small to pickle.

    Attributes:
        readers: number of processes that decode beside the rank; one more process reads.
        random_crop: crop the square at a random place along the longer side, not at the centre.
        in_flight: most bytes of decoded images that wait in the object store; exceeded only if a few blocks or
            batches are larger.
    """

    planned: PlannedIndex
    rank: int
    world_size: int
    readers: int = 2
    random_crop: bool = False
    in_flight: int = IN_FLIGHT_BYTES

    def batches(
        self,
        start_step: int,
        stop_step: int,
        prefetch: int = 2,
        pin: bool = False,
        on_bad: Callable[[dict[str, str]], object] = lambda bad: None,
    ) -> Generator["Batch", None, None]:
        """This rank's part of global batches [start_step, stop_step).

        Args:
            prefetch: number of batches made ahead.
            pin: put batches into page-locked memory.
            on_bad: called with the reasons by path, if images of a batch could not be decoded.
        """

        # Imported here because processes that only hand out streams run without torch, which takes seconds to import.
        from pipeline.data.batch import from_tables

        first, last = cut(self.planned.batch_size, self.rank, self.world_size)

        def produce() -> Iterator["Batch"]:
            tables = self._tables(start_step, stop_step) if start_step < stop_step else iter(())
            for pieces in _rebatch(tables, last - first, stop_step - start_step):
                batch = from_tables(pieces, self.planned.image)
                if batch.bad:
                    on_bad(batch.bad)
                yield batch.pin_memory() if pin else batch

        return _ahead(produce, prefetch)

    def _tables(self, start: int, stop: int) -> Iterator[pa.Table]:
        planned = self.planned
        first, last = cut(planned.batch_size, self.rank, self.world_size)
        rows = block_rows(planned.image, planned.image_bytes, last - first)
        steps = max(-(-(stop - start) // SPANS), SPAN_BLOCKS * rows // (last - first), 1)
        blocks = -(-(stop - start) * (last - first) // rows)
        spans = [{"start": begin, "stop": min(begin + steps, stop)} for begin in range(start, stop, steps)]
        beside: dict[str, Any] = {
            "batch_size": None,
            "batch_format": "pyarrow",
            # No CPU is requested, because the trainers may hold every CPU that Ray knows of.
            "num_cpus": 0,
            "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        }
        dataset = (
            ray.data.from_items(spans, override_num_blocks=len(spans))
            .map_batches(
                Read,
                fn_constructor_args=(planned.data, first, last, stop, rows),
                # One span at a time. Of two, Ray may run the later one first, and the stream would wait for all of it.
                compute=ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=1),
                **beside,
            )
            .map_batches(
                Decode,
                fn_constructor_args=(planned.image, planned.seed, self.random_crop),
                # Ray Data warns if there are more actors than blocks.
                compute=ActorPoolStrategy(size=min(self.readers, blocks), max_tasks_in_flight_per_actor=2),
                **beside,
            )
        )
        self._set_up(dataset.context, rows, last - first)
        for block in blocks_of(dataset):
            yield from tables_of(block)

    def _set_up(self, context: DataContext, rows: int, local_batch: int) -> None:
        context.enable_progress_bars = False
        # Without this, each task runs a thread for a figure that nothing reads.
        context.memory_usage_poll_interval_s = None
        context.target_max_block_size = 1  # a block is one row: see `as_row`
        context.execution_options.preserve_order = True
        set_pace(context)
        # Ray Data's iterator holds some blocks for us. Each decoding process has one block in work and one queued.
        # One process may also run ahead of another by as much, because blocks are handed over in order.
        size = pixel_bytes(self.planned.image)
        block, handed_over = rows * size, CONSUMER_TABLES * rows * size
        most = handed_over + 4 * self.readers * block
        least = max(handed_over + self.readers * block, BATCHES_AHEAD * local_batch * size)
        set_in_flight(context, max(min(self.in_flight, most), least), block, waiting=self.readers + 1)


class PlannedData(DataConfig):
    """Hands each rank its part of the plan, at every start or resize of the worker group."""

    def __init__(self, readers: int, random_crop: bool) -> None:
        super().__init__()
        self._readers, self._random_crop = readers, random_crop

    def configure(
        self, datasets: dict[str, Any], world_size: int, *_: object, **__: object
    ) -> list[dict[str, Any]]:
        return [
            {
                name: RankStream(planned, rank, world_size, self._readers, self._random_crop)
                for name, planned in datasets.items()
            }
            for rank in range(world_size)
        ]


def _rebatch(tables: Iterator[pa.Table], size: int, count: int) -> Iterator[list[pa.Table]]:
    """Cuts a stream of tables into `count` lists of pieces with `size` rows each."""
    rest: pa.Table | None = None
    for _ in range(count):
        pieces, missing = list[pa.Table](), size
        while missing:
            if rest is None or not rest.num_rows:
                rest = next(tables)
            pieces.append(rest.slice(0, missing))
            rest = rest.slice(missing)
            missing -= pieces[-1].num_rows
        yield pieces


def _ahead(produce: Callable[[], Iterator["Batch"]], depth: int) -> Generator["Batch", None, None]:
    """Runs an iterator in a thread that starts now, at most `depth` items ahead, until the consumer closes it."""
    items: queue.Queue[Batch | Exception | None] = queue.Queue(maxsize=max(depth, 1))
    stopped = threading.Event()

    def put(item: "Batch | Exception | None") -> None:
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
        except Exception as error:  # the consumer raises it
            put(error)

    def consume() -> Generator[Any, None, None]:
        try:
            yield None
            while (item := items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stopped.set()
            # The caller may leave Ray next. Ray then ends a process that still reads from it.
            thread.join(CLOSING_SECONDS)
            gc.collect()  # Ray Data holds its actors through a reference cycle; this ends them now

    thread = threading.Thread(target=run, name="batches-ahead", daemon=True)
    thread.start()
    batches = consume()
    # This runs `consume` into its `try`, so that closing it before the first batch ends the thread too.
    next(batches)
    return batches
