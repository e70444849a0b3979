"""How Ray Data's loop goes on: at a pace that leaves the processor to others, with a bound on what reads hold.

Both through Ray Data's own hooks, a callback and a backpressure policy.
"""

import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset

from pipeline.cluster.ray_internals import (
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
    ExecutionCallback,
)

STEP_SECONDS = 0.02
_BOUND = "ray_ddpm.in_flight"


class PacedExecution(ExecutionCallback):
    """At most one step of Ray Data's loop in STEP_SECONDS.

    While blocks wait that nobody needs yet, the loop has nothing to do and asks again at once. It would keep a core
    busy, and hold Python's lock of its process nearly all the time: beside it, in a trainer, a small network trains
    ten times as slowly. And what Ray Data keeps of every block, for a summary, is dropped: an execution lasts for a run.
    """

    _last = 0.0

    def on_execution_step(self, executor: Any) -> None:
        for operator in executor._topology:
            getattr(operator, "_output_blocks_stats", []).clear()
        time.sleep(max(0.0, self._last + STEP_SECONDS - time.monotonic()))
        self._last = time.monotonic()


class InFlightLimit(BackpressurePolicy):
    """Starts a task where its output has room beside what waits and what running tasks make.

    Ray's own policy halves the memory that it may use and then some, so that one reader works where there is room for
    three; and it leaves finished output unread, which its loop then asks for without end. What other operators take is
    bounded by the number of blocks that wait for them.
    """

    def can_add_input(self, op: Any) -> bool:
        if op.output_dependencies:
            return True
        bound, largest, _ = self._data_context.get_config(_BOUND)
        metrics = op.metrics
        made_by_running = metrics.bytes_task_outputs_generated - metrics.bytes_outputs_of_finished_tasks
        to_come = max(metrics.num_tasks_running * largest - made_by_running, 0)
        return bool(self._resource_manager.get_mem_op_outputs(op) + to_come + largest <= bound)

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        *_, most = self._data_context.get_config(_BOUND)
        takers = [self._topology[taker] for taker in op.output_dependencies]
        return 0 if any(taker.total_enqueued_input_blocks() >= most for taker in takers) else None


def blocks_of(dataset: Dataset) -> Iterator[pa.Table]:
    """The blocks of one execution, as they are made; closing it ends the execution.

    Ray Data's `iter_batches` leaves a thread behind where it is closed before its end, which holds blocks for ever.
    """
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            yield ray.get(entry.ref)


def set_pace(context: DataContext) -> None:
    """For the executions of datasets that have this context."""
    if PacedExecution not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(PacedExecution)


def set_in_flight(context: DataContext, bound: int, largest: int, waiting: int) -> None:
    """Bounds what tasks make and what waits.

    Args:
        bound: of the last operator's output, in bytes.
        largest: output of one of its tasks.
        waiting: blocks that wait for an operator.
    """
    context.set_config(_BOUND, (bound, largest, waiting))
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [InFlightLimit])
