"""The plan as a Ray Data source. Free of torch: a reading process starts without the seconds that it takes."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.data.index import DatasetIndex, read_rows
from pipeline.data.plan import Plan, Window, window_rows


@dataclass(frozen=True)
class Read:
    """One read task: a rank's rows of one window."""

    index: DatasetIndex
    plan: Plan
    window: Window
    start: int
    stop: int
    rank: int
    world_size: int

    def __call__(self) -> list[pa.Table]:
        rows = window_rows(self.plan, self.window, self.start, self.stop, self.rank, self.world_size)
        tables, places = [], []
        for group in np.unique(rows.group):
            here = np.flatnonzero(rows.group == group)
            tables.append(read_rows(self.index.groups[group], rows.row[here]))
            places.append(here)
        if not tables:
            return []
        table = pa.concat_tables(tables).take(np.argsort(np.concatenate(places)))
        ids = self.plan.first_id[rows.group] + rows.row
        epochs = np.full(len(ids), self.window.epoch, np.int64)
        return [table.append_column("id", pa.array(ids)).append_column("epoch", pa.array(epochs))]


class PlannedReads(Datasource):
    """The plan as a Ray Data source: one read task a window, in the plan's order."""

    def __init__(self, reads: list[Read]) -> None:
        self._reads = reads

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(read, unknown) for read in self._reads]
