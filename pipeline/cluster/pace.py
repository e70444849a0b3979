"""Limits the pace of Ray Data's loop, to leave the processor to others, and the memory that reads hold.

Both use Ray Data's own hooks, a callback and a backpressure policy.
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
    set_longest_wait,
)

# Seconds of a step of Ray Data's loop: the least, while tasks start or have output, and the most, while nothing happens.
STEP_SECONDS, LONGEST_STEP_SECONDS, GROWTH = 0.02, 0.1, 1.5
_BOUND = "ray_ddpm.in_flight"


class PacedExecution(ExecutionCallback):
    """Allows at most one step of Ray Data's loop per STEP_SECONDS, and fewer while nothing happens.

    Ray's own loop does not pause while blocks wait to be consumed. It would keep a core busy and hold Python's global
    lock nearly all the time, so a small network in the same process would train ten times as slowly.

    An execution lasts as long as a training run, so the statistics that Ray Data keeps of every block are dropped.
    """

    _last, _step, _seen = 0.0, STEP_SECONDS, -1

    def on_execution_step(self, executor: Any) -> None:
        seen = 0
        for operator in executor._topology:
            getattr(operator, "_output_blocks_stats", []).clear()
            seen += operator.metrics.num_tasks_submitted + operator.metrics.num_task_outputs_generated
        self._step = STEP_SECONDS if seen != self._seen else min(GROWTH * self._step, LONGEST_STEP_SECONDS)
        self._seen = seen
        time.sleep(max(0.0, self._last + self._step - time.monotonic()))
        self._last = time.monotonic()


class InFlightLimit(BackpressurePolicy):
    """Starts a task only if its output fits beside the waiting blocks and the output of running tasks.

    Ray's own policy uses less than half of the allowed memory, so one reader works where three would fit. It also leaves
    finished output unread and polls for it without end. The input of other operators is limited by the number of blocks
    that wait for them.
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
    """Yields the blocks of one execution as they are made. Closing the iterator ends the execution.

    Ray Data's `iter_batches` would leave a thread behind that holds blocks forever if it is closed early.
    """
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            yield ray.get(entry.ref)


def set_pace(context: DataContext) -> None:
    """Limits the pace of all executions with this context."""
    set_longest_wait(STEP_SECONDS)
    if PacedExecution not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(PacedExecution)


def set_in_flight(context: DataContext, bound: int, largest: int, waiting: int) -> None:
    """Limits the output of tasks and the number of waiting blocks.

    Args:
        bound: largest total output of the last operator, in bytes.
        largest: largest output of one of its tasks, in bytes.
        waiting: number of waiting blocks at which an operator gets no more.
    """
    context.set_config(_BOUND, (bound, largest, waiting))
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [InFlightLimit])
