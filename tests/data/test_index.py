"""The index of a split: it is compact, and a second opening doesn't repeat the scan of raw data."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.config import ImageConfig
from pipeline.data import scan
from pipeline.data.groups import Group, pack, read_rows, row_groups
from pipeline.data.index import GROUP_ROWS, DatasetIndex, Splits, open_splits
from pipeline.data.sources.folder import FolderPart
from tests.data.common import CLASSES, encoded, write_folder, write_parquet, write_tars

IMAGES = encoded(230)
WRITERS = {"folder": write_folder, "tars": write_tars, "parquet": write_parquet}


def test_a_quarter_of_a_million_groups_take_little_memory_and_travel_as_little() -> None:
    files = [(f"s3://bucket/folder/data/train-{n:05d}.parquet", [4096] * 16) for n in range(15_259)]
    groups = row_groups(files)
    assert len(groups) == 244_144
    assert len(pickle.dumps(groups)) < 32 * len(groups)
    assert (groups[-1].part.uri, groups[-1].part.start) == (files[-1][0], 15)  # type: ignore[attr-defined]
    assert [g.part.start for g in groups[15:18]] == [15, 0, 1]  # type: ignore[attr-defined]
    assert groups[17].rows == 4096


def test_packed_groups_are_what_was_packed() -> None:
    parts = [FolderPart("/x", (f"{n}.png", "y.png"), labels=("a", None)) for n in range(3)]
    groups = [Group(parts[n // 2], 2, np.array([0, 1]), np.array([n, -1])) for n in range(6)]
    packed = pack(groups)
    for one, other in zip(packed, groups, strict=True):
        assert (one.part, one.rows, one.kept.tolist(), one.labels.tolist()) == (  # type: ignore[union-attr]
            other.part, 2, [0, 1], [other.labels[0], -1],  # type: ignore[index]
        )  # fmt: skip
    with pytest.raises(IndexError):
        packed[6]
    many = pack([Group(part, 8, np.arange(8), np.arange(8)) for part in parts for _ in range(10_000)])
    assert len(pickle.dumps(many)) < (32 + 8 * 8) * len(many)  # plus labels and places of 8 images


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_images_that_can_be_read_alone_are_drawn_by_few(kind: str, tmp_path: Path) -> None:
    index = open_splits(str(WRITERS[kind](tmp_path / "data", IMAGES)))["train"]
    assert not index.whole
    assert max(index.group_rows) == GROUP_ROWS
    assert index.bytes == pytest.approx(sum(map(len, IMAGES)) * index.rows / len(IMAGES), rel=0.02)


def test_row_groups_are_read_whole(tmp_path: Path) -> None:
    index = open_splits(str(write_parquet(tmp_path / "data", IMAGES)))["train"]
    assert index.whole
    assert max(index.group_rows) > GROUP_ROWS


def content(splits: Splits) -> dict[str, object]:
    return {
        name: (
            index.image, index.fingerprint, index.order, index.bytes, index.whole, index.quarantined,
            [read_rows(group, np.arange(group.rows)).to_pydict() for group in index.groups],
        )
        for name, index in splits.indexes.items()
    }  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_what_was_read_through_once_is_not_read_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = WRITERS[kind](tmp_path / "data", IMAGES), str(tmp_path / "run")
    first = open_splits(str(folder), output=run)
    assert first.keep(run).to_keep == b""
    read = list[str]()
    real = scan._scanned
    monkeypatch.setattr(scan, "_scanned", lambda part: read.append(part.names[0]) or real(part))  # type: ignore[func-returns-value]
    again = open_splits(str(folder), output=run)
    assert content(again) == content(first)
    assert not read
    assert again.to_keep == b""
    # Only new or changed files are read.
    extra = sorted(path for path in folder.rglob("*.*") if path.is_file())[0]
    new = extra.with_name(f"{extra.stem}-again{extra.suffix}")
    new.write_bytes(extra.read_bytes())
    changed = open_splits(str(folder), output=run)
    assert changed.to_keep
    if kind != "folder":
        assert set(read) == {new.name}
    monkeypatch.undo()
    assert content(changed) == content(open_splits(str(folder)))


@pytest.mark.usefixtures("cluster")
def test_much_data_is_read_by_the_cluster_and_found_to_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folders = [write(tmp_path / kind, IMAGES) for kind, write in WRITERS.items()]
    (folders[0] / "damaged.png").write_bytes(b"no image")
    expected = [open_splits(str(folder)) for folder in folders]
    read_here = list[str]()
    real = scan._scanned
    monkeypatch.setattr(scan, "_scanned", lambda part: read_here.append(part.names[0]) or real(part))  # type: ignore[func-returns-value]
    monkeypatch.setattr(scan, "ON_CLUSTER_BYTES", 0)
    capfd.readouterr()
    for folder, splits in zip(folders, expected, strict=True):
        assert content(open_splits(str(folder))) == content(splits)
    assert not read_here
    assert "read the data once: " in capfd.readouterr().err


def test_a_damaged_record_of_a_scan_is_left_aside(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", IMAGES[:30])
    run = str(tmp_path / "run")
    storage.write_atomic(storage.join(run, scan.SCAN), b"PAR1 not really")
    splits = open_splits(str(folder), output=run)
    assert splits.to_keep
    assert sum(index.rows for index in splits.indexes.values()) == 30


def sorted_index(rows: int, group: int) -> DatasetIndex:
    """Return an index of 1 MB images sorted by class, 100 classes, in groups that are read whole."""
    labels = np.repeat(np.arange(100), rows // 100)
    part = FolderPart("/x", ("y",), labels=(None,))
    places = np.arange(group)
    groups = [Group(part, group, places, labels[at : at + group]) for at in range(0, rows, group)]
    return DatasetIndex("/x", "train", ImageConfig(8, 3), pack(groups), "", bytes=rows * 10**6)


def test_a_line_says_where_batches_hold_too_few_classes() -> None:
    large, small = sorted_index(100_000, 1000), sorted_index(100_000, 2)
    assert "holds some" in large.poorly_mixed(large.plan(0, 128))
    assert "jobs/prepare.py" in large.poorly_mixed(large.plan(0, 128))
    assert small.poorly_mixed(small.plan(0, 128)) == ""


def test_few_classes_in_any_order_need_no_line(tmp_path: Path) -> None:
    index = open_splits(str(write_folder(tmp_path / "data", IMAGES)))["train"]
    assert index.image.classes == CLASSES
    assert index.poorly_mixed(index.plan(0, 32)) == ""
