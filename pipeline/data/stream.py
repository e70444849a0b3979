"""From the plan to a rank's batches: Ray Data reads and decodes beside the trainer, which only copies.

Encoded bytes travel from storage to the node of the trainer that uses them, and are decoded there, in processes
of their own: pixels never cross the network, and Python's lock in the trainer is left to training. One Ray Data
execution spans many epochs, since each start of one costs seconds.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.train import DataConfig

from pipeline.cluster.pace import set_in_flight, set_pace, tables_of
from pipeline.data.index import DatasetIndex
from pipeline.data.order import Plan, local_batch_size, windows_between
from pipeline.data.reads import BLOCK_BYTES, Reader, make_read_tasks, pixel_bytes, rows_ahead

if TYPE_CHECKING:
    from pipeline.data.batch import Batch

WINDOWS_PER_EXECUTION = 1024
IN_FLIGHT_BYTES = 8 * BLOCK_BYTES
CONSUMER_TABLES = 4
CLOSING_SECONDS = 30.0


@dataclass(frozen=True)
class RankStream:
    """What one rank of `world_size` sees of the plan: small, travels to the rank by pickle.

    Attributes:
        readers: processes that read and decode beside the rank.
        in_flight: most bytes of decoded images that wait in the object store; more where some reads or batches are
            larger.
        random_crop: cut the square out of an image's longer side at random, not in its centre.
    """

    index: DatasetIndex
    plan: Plan
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
    ) -> Iterator["Batch"]:
        """This rank's part of the global batches [start_step, stop_step), `prefetch` of them made ahead.

        Args:
            pin: in page-locked memory.
            on_bad: is told which images could not be decoded, and why.
        """

        # Here, since processes that only hand streams out do without torch, which takes seconds.
        from pipeline.data.batch import from_tables

        def produce() -> Iterator["Batch"]:
            tables = self._tables(start_step * self.plan.batch_size, stop_step * self.plan.batch_size)
            steps = range(start_step, stop_step)
            sizes = (local_batch_size(self.plan, step, self.rank, self.world_size) for step in steps)
            for pieces in _rebatch(tables, sizes):
                batch = from_tables(pieces, self.index.image)
                if batch.bad:
                    on_bad(batch.bad)
                yield batch.pin_memory() if pin else batch

        return _ahead(produce, prefetch)

    def _tables(self, start: int, stop: int) -> Iterator[pa.Table]:
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        windows = windows_between(self.plan, start, stop)
        while some := list(islice(windows, WINDOWS_PER_EXECUTION)):
            tasks = make_read_tasks(
                self.index, self.plan, some, start, stop, self.rank, self.world_size, self.random_crop
            )
            # Ray Data's iterator holds some tables for us; each reader has one read task in work and one to come.
            largest = max(task.decoded_bytes for task in tasks)
            batches = rows_ahead(self.plan, self.world_size) * pixel_bytes(self.index.image)
            numbers = [{"task": number} for number in range(len(tasks))]
            # No CPU is asked for: the trainers may hold every CPU that Ray knows of.
            dataset = ray.data.from_items(numbers, override_num_blocks=len(tasks)).map_batches(
                Reader,
                fn_constructor_args=(tasks,),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=0,
                label_selector=here,
                compute=ActorPoolStrategy(
                    size=min(self.readers, len(tasks)), max_tasks_in_flight_per_actor=2
                ),
            )
            context = dataset.context
            context.enable_progress_bars = False
            # Else a thread in each task, for a figure that nothing reads.
            context.memory_usage_poll_interval_s = None
            set_pace(context)
            context.target_max_block_size = BLOCK_BYTES
            context.execution_options.preserve_order = True
            handed_over = CONSUMER_TABLES * min(largest, BLOCK_BYTES)
            most = handed_over + 2 * self.readers * largest
            least = max(handed_over + self.readers * largest, batches)
            set_in_flight(context, max(min(self.in_flight, most), least), largest)
            yield from tables_of(dataset)


class PlannedData(DataConfig):
    """Hands each rank its part of the plan, anew at every start or resize of the worker group."""

    def __init__(self, plan: Plan, readers: int, random_crop: bool) -> None:
        super().__init__()
        self._plan, self._readers, self._random_crop = plan, readers, random_crop

    def configure(
        self, datasets: dict[str, Any], world_size: int, *_: object, **__: object
    ) -> list[dict[str, Any]]:
        return [
            {
                name: RankStream(index, self._plan, rank, world_size, self._readers, self._random_crop)
                for name, index in datasets.items()
            }
            for rank in range(world_size)
        ]


def _rebatch(tables: Iterator[pa.Table], sizes: Iterator[int]) -> Iterator[list[pa.Table]]:
    """Cuts a stream of tables into lists of pieces with the given numbers of rows; stops when either ends."""
    rest: pa.Table | None = None
    for size in sizes:
        pieces, missing = list[pa.Table](), size
        while missing or not pieces:
            if rest is None or not rest.num_rows:
                rest = next(tables, None)
                if rest is None:
                    return
            pieces.append(rest.slice(0, missing))
            rest = rest.slice(missing)
            missing -= pieces[-1].num_rows
        yield pieces


def _ahead(produce: Callable[[], Iterator["Batch"]], depth: int) -> Iterator["Batch"]:
    """Runs an iterator in a thread from now on, at most `depth` items ahead, until the consumer closes it."""
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
        except Exception as error:  # handed to the consumer, who raises it
            put(error)

    def consume() -> Iterator[Any]:
        try:
            yield None
            while (item := items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stopped.set()
            # Whoever closes it may leave Ray next, which ends a process that still reads from it.
            thread.join(CLOSING_SECONDS)

    thread = threading.Thread(target=run, name="batches-ahead", daemon=True)
    thread.start()
    batches = consume()
    # It is in its `try` from here on: closing it before its first batch ends the thread too.
    next(batches)
    return batches
