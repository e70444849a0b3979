"""Folders of image files: cutting into parts, and reading of the parts."""

import pickle
from collections import Counter
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data.sources import fetch
from pipeline.data.sources.folder import FolderPart
from pipeline.data.sources.parts import Request
from pipeline.data.sources.registry import open_source
from tests.data.common import encoded, label_of, write_folder
from tests.data.reading import opened, put


@pytest.mark.parametrize("count", [1, 19, 20, 21, 150, 1000])
def test_parts_are_of_about_the_size_asked_for_and_mixed(count: int, tmp_path: Path) -> None:
    put(tmp_path, *(f"{'abc'[i % 3]}/{i:04d}.png" for i in range(count)), data=b"x")
    parts = open_source("folder", str(tmp_path), Request(20)).listing.parts
    sizes = [len(part.names) for part in parts]
    assert sum(sizes) == count and max(sizes) <= 40 and len(parts) <= max(1, 2 * count / 10)
    assert (
        sum(len(set(part.labels)) == 3 for part in parts if isinstance(part, FolderPart)) >= 0.8 * len(parts)
        or count < 20
    )
    assert pickle.loads(pickle.dumps(parts)) == parts
    assert len(pickle.dumps(parts)) < 400 + 100 * len(parts) + 24 * count


def test_another_file_changes_one_part(tmp_path: Path) -> None:
    put(tmp_path, *(f"a/{i:04d}.png" for i in range(200)), data=b"x")
    before = set(open_source("folder", str(tmp_path), Request(20)).listing.parts)
    for change in (
        lambda: put(tmp_path, "a/new.png"),
        (tmp_path / "a" / "0007.png").unlink,
        lambda: put(tmp_path, "b/c.png"),
    ):
        change()
        after = set(open_source("folder", str(tmp_path), Request(20)).listing.parts)
        assert len(before - after) == 1 == len(after - before)
        before = after


def test_a_part_knows_where_its_images_were_before_there_were_more(tmp_path: Path) -> None:
    put(tmp_path, *(f"{i:04d}.png" for i in range(100)), data=b"x")
    few = open_source("folder", str(tmp_path), Request(20)).listing.parts
    put(tmp_path, *(f"{i:04d}.png" for i in range(100, 300)), data=b"x")
    many = open_source("folder", str(tmp_path), Request(20)).listing.parts
    assert len(many) > len(few)
    for part in many:
        old = set(part.names) & {f"{i:04d}.png" for i in range(100)}
        (before,) = [other for other in few if part.slot.startswith(other.slot)]
        assert old <= set(before.names)


def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = encoded(12)
    part = open_source("folder", str(write_folder(tmp_path / "x", images)), Request(50)).listing.parts[0]
    whole, asked = list(part.read()), list[str]()
    assert {item.data: item.label for item in whole} == {
        d: ("cat", "dog", "owl")[label_of(i)] for i, d in enumerate(images)
    }
    read = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: asked.append(uri) or read(uri))
    for rows in ([7, 0, 11, 7], [3], []):
        asked.clear()
        assert list(part.read(rows)) == [whole[row] for row in rows]
        assert len(asked) == len(rows)


@pytest.mark.slow
def test_a_remote_folder_is_read_several_files_at_a_time_in_order(bucket: str) -> None:
    fs, path = storage.open_fs(bucket)
    names = [f"d/{c}/{n}.png" for c in ("cat", "d o%41g#[*") for n in range(30)] + ["d/metadata.txt"]
    for i, name in enumerate(names):
        fs.pipe_file(f"{path}/{name}", f"{i}".encode())
    found, items = opened(f"{bucket}/d", 100)
    assert {item.path: item.data for item in items} == {
        n[2:]: f"{i}".encode() for i, n in enumerate(names[:-1])
    }
    assert Counter(item.label for item in items) == {"cat": 30, "d o%41g#[*": 30}
    (part,) = found.listing.parts
    assert [i.path for i in part.read([5, 1, 5])] == [items[n].path for n in (5, 1, 5)]
    first = next(iter(part.read()))
    assert first == items[0]
    fs.rm_file(f"{path}/d/{part.names[3]}")
    assert [i.reason for i in part.read(range(5))] == [
        "",
        "",
        "",
        "can't be read: it no longer exists",
        "",
    ]
    assert fetch.THREADS < 32
