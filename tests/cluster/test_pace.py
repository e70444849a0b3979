"""Ray Data's loop leaves the processor to the trainer beside it."""

import time

import pyarrow as pa
import ray.data
from ray.data import ExecutionResources

from pipeline.cluster.pace import STEP_SECONDS
from pipeline.cluster.ray_internals import ExecutionCallback


class Steps(ExecutionCallback):
    """Counts the steps of the loop."""

    count = 0

    def on_execution_step(self, executor: object) -> None:
        Steps.count += 1


def filled(table: pa.Table) -> pa.Table:
    """8 MB for every number."""
    return pa.table({"filled": [bytes(2**23)] * table.num_rows})


def test_while_blocks_wait_the_loop_goes_on_at_its_pace(cluster: None) -> None:
    data = ray.data.range(16, override_num_blocks=16).map_batches(
        filled, batch_size=None, batch_format="pyarrow", num_cpus=0.1
    )
    data.context.enable_progress_bars = False
    # What is made and may not yet be taken makes the loop ask again at once.
    data.context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=2**25)
    data.context.custom_execution_callback_classes.append(Steps)
    tables = iter(data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    next(tables)
    before, began = Steps.count, time.monotonic()
    time.sleep(2)
    steps, seconds = Steps.count - before, time.monotonic() - began
    assert 0 < steps <= seconds / STEP_SECONDS + 1
    assert len(list(tables)) == 15
