"""Ray Data's scheduling loop leaves the CPU to the trainer beside it."""

import time
from collections.abc import Iterator

import pyarrow as pa
import ray.data
from ray.data import ExecutionResources

from pipeline.cluster.pace import STEP_SECONDS, set_pace
from pipeline.cluster.ray_internals import ExecutionCallback


class Steps(ExecutionCallback):
    """Counts the steps of Ray Data's scheduling loop."""

    count = 0

    def on_execution_step(self, executor: object) -> None:
        Steps.count += 1


def filled(table: pa.Table) -> pa.Table:
    """Return 8 MiB for every row."""
    return pa.table({"filled": [bytes(2**23)] * table.num_rows})


class Kept(ExecutionCallback):
    """Records the most entries that an execution keeps of blocks it has handed over. Runs after the pace's callbacks."""

    most = 0

    def on_execution_step(self, executor: object) -> None:
        operators = list(executor._topology)  # type: ignore[attr-defined]
        Kept.most = max(Kept.most, *(len(getattr(o, "_output_blocks_stats", [])) for o in operators))


def numbers(table: pa.Table) -> Iterator[pa.Table]:
    for number in range(100):
        yield pa.table({"number": [number]})


def test_an_execution_keeps_nothing_of_what_it_has_handed_over(cluster: None) -> None:
    data = ray.data.from_items([{"run": 0}], override_num_blocks=1).map_batches(
        numbers, batch_size=None, batch_format="pyarrow", num_cpus=0.1
    )
    data.context.enable_progress_bars = False
    data.context.target_max_block_size = 1
    set_pace(data.context)
    data.context.custom_execution_callback_classes.append(Kept)
    assert len(list(data.iter_batches(batch_size=None, batch_format="pyarrow"))) == 100
    assert Kept.most < 50


def test_while_blocks_wait_the_loop_goes_on_at_its_pace(cluster: None) -> None:
    data = ray.data.range(16, override_num_blocks=16).map_batches(
        filled, batch_size=None, batch_format="pyarrow", num_cpus=0.1
    )
    data.context.enable_progress_bars = False
    # Without the pace, blocks that are ready but may not be taken yet make the loop ask again at once.
    data.context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=2**25)
    data.context.custom_execution_callback_classes.append(Steps)
    tables = iter(data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    next(tables)
    before, began = Steps.count, time.monotonic()
    time.sleep(2)
    steps, seconds = Steps.count - before, time.monotonic() - began
    # Little happens meanwhile, so most steps are long.
    assert 0 < steps <= 0.5 * seconds / STEP_SECONDS
    assert len(list(tables)) == 15
