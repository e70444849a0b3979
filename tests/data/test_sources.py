"""Every source is read whole, in small parts and by position, is split by content, and loses only what is damaged."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipeline.config import Source
from pipeline.data.groups import read_rows
from pipeline.data.images import decode
from pipeline.data.index import DatasetIndex, open_dataset
from pipeline.data.sources.folder import FolderPart
from pipeline.data.sources.parquet import read_row_group
from pipeline.data.sources.parts import Item, Part, Request
from pipeline.data.sources.registry import open_source
from pipeline.errors import InputError
from tests.data.common import (
    CLASSES,
    encode,
    encoded,
    label_of,
    picture,
    plain_parquet,
    tar_bytes,
    write_folder,
    write_idx,
    write_parquet,
    write_tars,
)

IMAGES = encoded(230)
WRITERS: dict[Source, Callable[[Path, list[bytes]], Path]] = {
    "folder": write_folder,
    "webdataset": write_tars,
    "huggingface": write_parquet,
}


def read_all(source: Source, uri: Path, images_per_part: int = 50) -> list[Item]:
    return [item for part in parts_of(source, uri, images_per_part) for item in part.read()]


def parts_of(source: Source, uri: Path, images_per_part: int) -> tuple[Part, ...]:
    return open_source(source, str(uri), Request(images_per_part)).listing.parts


def rows_of(index: DatasetIndex) -> list[tuple[bytes, int]]:
    tables = [read_rows(group, np.arange(group.rows)) for group in index.groups]
    return [row for t in tables for row in zip(t["bytes"].to_pylist(), t["label"].to_pylist(), strict=True)]


@pytest.mark.parametrize("source", WRITERS)
def test_all_images_are_read_with_their_labels(source: Source, tmp_path: Path) -> None:
    items = read_all(source, WRITERS[source](tmp_path / "data", IMAGES))
    names = list(CLASSES) if source != "webdataset" else ["0", "1", "2"]
    assert {item.data: item.label for item in items} == {d: names[label_of(i)] for i, d in enumerate(IMAGES)}
    assert len({item.path for item in items}) == len(IMAGES)


@pytest.mark.parametrize("source", WRITERS)
def test_parts_travel_small(source: Source, tmp_path: Path) -> None:
    parts = parts_of(source, WRITERS[source](tmp_path / "data", IMAGES), 50)
    assert pickle.loads(pickle.dumps(parts)) == parts
    files = sum(len(part.names) for part in parts if isinstance(part, FolderPart))
    assert len(pickle.dumps(parts)) < 400 + 100 * len(parts) + 20 * files


@pytest.mark.parametrize("source", WRITERS)
def test_sources_open_without_being_prepared(source: Source, tmp_path: Path) -> None:
    uri = str(WRITERS[source](tmp_path / "data", IMAGES))
    assert open_source("auto", uri, Request(50)).source == source
    train, held_out = open_dataset(uri), open_dataset(uri, "validation")
    assert (train.image.size, train.image.channels) == (12, 3)
    assert train.image.classes == (CLASSES if source != "webdataset" else ("0", "1", "2"))
    assert 10 <= held_out.rows <= 40
    seen = rows_of(train) + rows_of(held_out)
    assert sorted(seen) == sorted((data, label_of(i)) for i, data in enumerate(IMAGES))


@pytest.mark.parametrize("source", WRITERS)
def test_rows_are_read_by_position(source: Source, tmp_path: Path) -> None:
    index = open_dataset(str(WRITERS[source](tmp_path / "data", IMAGES)))
    group = max(index.groups, key=lambda g: g.rows)
    whole = read_rows(group, np.arange(group.rows))
    wanted = np.array([7, 0, group.rows - 1, 7])
    assert read_rows(group, wanted).equals(whole.take(wanted))
    assert max(g.rows for g in index.groups) <= 64


def test_the_same_images_are_held_out_however_they_are_cut(tmp_path: Path) -> None:
    cuts = [
        write_tars(tmp_path / "a", IMAGES, per_tar=100),
        write_tars(tmp_path / "b", IMAGES, per_tar=7),
        write_tars(tmp_path / "c", IMAGES[::-1], per_tar=300),
    ]
    held_out = [{d for d, _ in rows_of(open_dataset(str(cut), "validation"))} for cut in cuts[:2]]
    assert held_out[0] == held_out[1]
    fingerprints = [open_dataset(str(cut)).fingerprint for cut in cuts]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]  # c has other labels


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", IMAGES[:20])
    before = open_dataset(str(folder)).fingerprint
    (folder / "cat" / "0000.png").write_bytes(IMAGES[100])
    assert open_dataset(str(folder)).fingerprint != before


def test_idx_files_with_their_labels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 9, 9), dtype=np.uint8)
    labels = np.arange(150) % 4
    folder = write_idx(tmp_path / "mnist", pixels, labels)
    items = read_all("idx", folder, 64)
    assert [item.label for item in items] == [str(label) for label in labels]
    assert all((decode(item.data, 9, 1)[..., 0] == p).all() for item, p in zip(items, pixels, strict=True))
    index = open_dataset(str(folder))
    assert (index.image.size, index.image.channels, index.image.classes) == (9, 1, ("0", "1", "2", "3"))
    assert index.rows + open_dataset(str(folder), "validation").rows == 150


def test_webdataset_itself_reads_the_same_tars(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "data", IMAGES)
    theirs = {
        sample["png"]: sample["cls"].decode()
        for tar in sorted(folder.iterdir())
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)
    }
    assert {item.data: item.label for item in read_all("webdataset", folder)} == theirs


def test_labels_in_json_and_text_classes(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (
            ("a/0.jpg", IMAGES[0]),
            ("a/0.json", json.dumps({"label": "owl"}).encode()),
            ("a/1.seg.png", IMAGES[1]),
            ("a/1.png", IMAGES[2]),
            ("a/1.cls", b"cat\n"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    items = read_all("webdataset", tmp_path)
    assert [(item.data, item.label) for item in items] == [
        (IMAGES[0], "owl"), (IMAGES[1], "cat"), (IMAGES[2], "cat")
    ]  # fmt: skip
    assert open_dataset(str(tmp_path)).image.classes == ("cat", "owl")


def test_members_cannot_reach_outside(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(IMAGES[9])
    with tarfile.open(tmp_path / "data" / "evil.tar", "w") as tar:
        for name in ("../../escaped.png", "/tmp/absolute-escape.png"):
            member = tarfile.TarInfo(name)
            member.size = len(IMAGES[0])
            tar.addfile(member, io.BytesIO(IMAGES[0]))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.png")
            link.type, link.linkname = kind, str(secret)
            tar.addfile(link)
    items = read_all("webdataset", tmp_path / "data")
    assert all(item.data != IMAGES[9] for item in items)
    assert all(".." not in item.path and not item.path.startswith("/") for item in items)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "secret.png"]
    assert not Path("/tmp/absolute-escape.png").exists()


def test_parquet_of_others(tmp_path: Path) -> None:
    plain_parquet(tmp_path / "a.parquet", IMAGES[:30], pa.array([f"c{i % 2}" for i in range(30)]))
    index = open_dataset(str(tmp_path))
    assert index.image.classes == ("c0", "c1")
    assert {(d, label) for d, label in rows_of(index)} <= {(d, i % 2) for i, d in enumerate(IMAGES[:30])}
    pq.write_table(pa.table({"pixels": [1]}), tmp_path / "b.parquet")
    assert "b.parquet" in open_source("auto", str(tmp_path), Request(50)).listing.ignored
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(InputError, match="Parquet files, none with a column of images"):
        open_dataset(str(tmp_path))


def test_a_pattern_chooses_files(tmp_path: Path) -> None:
    write_parquet(tmp_path, IMAGES)
    one = open_dataset(str(tmp_path / "*-0.parquet"))
    assert one.rows + open_dataset(str(tmp_path / "*-0.parquet"), "validation").rows == 115


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    write_folder(tmp_path, [encode(picture(i, 10 + i, 20)) for i in range(40)])
    with pytest.raises(InputError, match="--image-size"):
        open_dataset(str(tmp_path))
    assert open_dataset(str(tmp_path), image_size=8).image.size == 8


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("x")
    (tmp_path / "begun" / "parts").mkdir(parents=True)
    (tmp_path / "begun" / "parts" / "settings.json").write_text("{}")
    for name, reason in (
        ("none", "no such folder"),
        ("empty", "empty"),
        ("other", "holds no"),
        ("begun", "not finished"),
    ):
        with pytest.raises(InputError, match=reason):
            open_dataset(str(tmp_path / name))


def test_damage_in_a_tar_costs_only_what_is_damaged(tmp_path: Path) -> None:
    whole = tar_bytes(IMAGES[:90])
    broken = bytearray(whole)
    header = whole.index(b"0030.png")
    broken[header : header + 8] = b"\xff" * 8
    (tmp_path / "a.tar").write_bytes(bytes(broken))
    items = read_all("webdataset", tmp_path)
    assert [item.data for item in items if item.data] == IMAGES[:30] + IMAGES[31:90]
    assert [item.path for item in items if not item.data] == [f"a.tar: damaged at byte {header}"]
    (tmp_path / "a.tar").write_bytes(whole[: whole.index(b"0080.png") + 700])
    items = read_all("webdataset", tmp_path)
    assert [item.data for item in items if item.data] == IMAGES[:80]
    assert len(items) == 81
    index = open_dataset(str(tmp_path))
    assert index.rows + open_dataset(str(tmp_path), "validation").rows == 80
    assert index.quarantined == 1


def test_threads_read_one_parquet_file_at_a_time_each_for_itself(tmp_path: Path) -> None:
    images = [{"bytes": bytes([i % 251]) * 200, "path": f"{i}.png"} for i in range(6000)]
    table = pa.table({"image": images, "label": pa.array(range(6000), pa.int64())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: read_row_group(str(tmp_path / "a.parquet"), n % 300), range(1200)))
    assert [t["label"].to_pylist() for t in found[:300]] == [
        list(range(i, i + 20)) for i in range(0, 6000, 20)
    ]
    assert all(t.equals(found[n % 300]) for n, t in enumerate(found))


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    digits, items = load_digits(), read_all("digits", Path())
    pixels = np.stack([item.data for item in items])
    assert np.array_equal(pixels[..., 0], np.round(digits.images * (255 / 16)).astype(np.uint8))
    assert [item.label for item in items] == [str(label) for label in digits.target]
