"""A resume skips by position: images already seen are neither read nor decoded again."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ImageConfig
from pipeline.data import blocks, reads
from pipeline.data.blocks import Decode
from pipeline.data.groups import Group, row_groups
from pipeline.data.images import encode_png
from pipeline.data.index import DatasetIndex
from pipeline.data.order import Plan, batch_rows
from pipeline.data.reads import RankRows

ROWS, GROUPS = 8, 6


@pytest.fixture
def index(tmp_path: Path) -> DatasetIndex:
    """Six row groups of eight images. Each image has a grey value of its own."""
    images = [
        {"bytes": encode_png(np.full((4, 4, 1), i, np.uint8)), "path": f"{i}.png"}
        for i in range(ROWS * GROUPS)
    ]
    table = pa.table({"image": images, "label": pa.array([0] * len(images), pa.int64())})
    file = tmp_path / "data.parquet"
    pq.write_table(table, file, row_group_size=ROWS)
    groups = row_groups([(str(file), [ROWS] * GROUPS)])
    return DatasetIndex(str(tmp_path), "train", ImageConfig(4, 1), groups, "")


def test_what_was_seen_is_neither_read_nor_decoded(
    index: DatasetIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(index.group_rows, seed=3, batch_size=6, lanes=3)
    read, decoded = list[int](), list[int]()

    def read_rows(group: Group, rows: np.ndarray) -> pa.Table:
        read.append(len(rows))
        return real_read(group, rows)

    def decode(data: bytes, *arguments: int, **options: object) -> np.ndarray:
        image = real_decode(data, *arguments, **options)
        decoded.append(int(image[0, 0, 0]))
        return image

    def images(start: int, first: int, last: int) -> list[int]:
        """Return the images of steps `start` to 8 (the epoch's end) at positions [first, last) of each batch."""
        read.clear()
        decoded.clear()
        decoding = Decode(index.image, plan.seed, random_crop=False)
        tables = [decoding.decoded(t) for t in RankRows(index, plan, first, last, 8).tables(start, 8, 4)]
        assert all(table.num_rows <= 4 for table in tables)
        return [i for table in tables for i in table["id"].to_pylist()]

    real_read, real_decode = reads.read_rows, blocks.decode
    monkeypatch.setattr(reads, "read_rows", read_rows)
    monkeypatch.setattr(blocks, "decode", decode)
    whole = images(0, 0, 6)
    assert sorted(whole) == sorted(decoded) == list(range(ROWS * GROUPS))
    assert len(read) == GROUPS  # each group once, though the cuts between lanes divide some
    for first, last in ((0, 6), (0, 1), (1, 4)):
        left = images(5, first, last)
        assert left == np.array(whole).reshape(8, 6)[5:, first:last].ravel().tolist()
        assert sorted(decoded) == sorted(left)
        assert sum(read) == len(left)


def test_tables_grow_and_depend_on_the_steps_alone(
    index: DatasetIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a reading process dies, another one must make the same tables, of which the first may have arrived already."""
    monkeypatch.setattr(reads, "FIRST_ROWS", 2)
    plan = Plan(index.group_rows, seed=3, batch_size=6, lanes=3)

    def tables(reader: RankRows, start: int, stop: int) -> list[list[int]]:
        return [table["id"].to_pylist() for table in reader.tables(start, stop, 30)]

    reader = RankRows(index, plan, 0, 6, 80)
    before, again = tables(reader, 0, 40), tables(reader, 40, 80)
    assert [len(table) for table in before][:4] == [6, 12, 24, 30]
    assert sum(len(table) for table in before + again) == 80 * 6
    assert tables(RankRows(index, plan, 0, 6, 80), 40, 80) == again


def test_a_group_that_is_open_for_long_is_read_again_rather_than_planned_without_end(
    index: DatasetIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(index.group_rows, seed=3, batch_size=6, lanes=3)
    expected = batch_rows(plan, 0, 40)
    monkeypatch.setattr(Plan, "steps_open", 1)
    tables = list(RankRows(index, plan, 0, 6, 40).tables(0, 40, 4))
    assert [i for t in tables for i in t["id"].to_pylist()] == plan.ids(expected).ravel().tolist()
    assert [decode_png(d) for t in tables for d in t["bytes"].to_pylist()] == [
        i for t in tables for i in t["id"].to_pylist()
    ]


def decode_png(data: bytes) -> int:
    return int(blocks.decode(data, 4, 1)[0, 0, 0])
