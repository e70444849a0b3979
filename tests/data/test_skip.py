"""A resume skips by position: what was seen is neither read nor decoded again."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ImageConfig
from pipeline.data import reads
from pipeline.data.images import encode_png
from pipeline.data.index import DatasetIndex, Group, row_group
from pipeline.data.order import Plan, windows_between
from pipeline.data.reads import make_read_tasks
from pipeline.data.stream import RankStream

ROWS, GROUPS = 8, 6


@pytest.fixture
def index(tmp_path: Path) -> DatasetIndex:
    """Six row groups of eight images, each of one grey of its own."""
    images = [
        {"bytes": encode_png(np.full((4, 4, 1), i, np.uint8)), "path": f"{i}.png"}
        for i in range(ROWS * GROUPS)
    ]
    table = pa.table({"image": images, "label": pa.array([0] * len(images), pa.int64())})
    file = tmp_path / "data.parquet"
    pq.write_table(table, file, row_group_size=ROWS)
    groups = tuple(row_group(str(file), number, ROWS) for number in range(GROUPS))
    return DatasetIndex(str(tmp_path), "train", ImageConfig(4, 1), groups, "")


def test_what_was_seen_is_neither_read_nor_decoded(
    index: DatasetIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan((ROWS,) * GROUPS, seed=3, batch_size=6, groups_per_window=2)
    groups, decoded = list[int](), list[int]()

    def read_rows(group: Group, rows: np.ndarray) -> pa.Table:
        groups.append(len(rows))
        return real_read(group, rows)

    def decode(data: bytes, *arguments: int, **options: object) -> np.ndarray:
        image = real_decode(data, *arguments, **options)
        decoded.append(int(image[0, 0, 0]))
        return image

    def tables(self: RankStream, start: int, stop: int) -> Iterator[pa.Table]:
        windows = list(windows_between(self.plan, start, stop))
        for task in make_read_tasks(
            self.index, self.plan, windows, start, stop, self.rank, self.world_size, False
        ):
            yield from task()

    real_read, real_decode = reads.read_rows, reads.decode
    monkeypatch.setattr(reads, "read_rows", read_rows)
    monkeypatch.setattr(reads, "decode", decode)
    monkeypatch.setattr(RankStream, "_tables", tables)
    whole = list(RankStream(index, plan, 0, 1).batches(0, 8))  # one epoch
    groups.clear()
    decoded.clear()
    rest = list(RankStream(index, plan, 0, 1).batches(5, 8))
    seen = [int(i) for batch in whole[:5] for i in batch.ids]
    left = [int(i) for batch in rest for i in batch.ids]
    assert sorted(seen + left) == list(range(ROWS * GROUPS))
    assert left == [int(i) for batch in whole[5:] for i in batch.ids]
    assert sorted(decoded) == sorted(left)
    assert sum(groups) == len(left)
