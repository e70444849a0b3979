"""Zip archives of images: members, classes, splits, labels, damage."""

import json
import pickle
import shutil
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data.sources import zip_members
from pipeline.data.sources.parts import Request
from pipeline.data.sources.registry import open_source
from pipeline.data.sources.tree import open_tree
from pipeline.data.sources.zips import ZipPart, is_zip
from pipeline.errors import InputError
from tests.data.common import encode, encoded, picture
from tests.data.reading import PNG, labels, opened, put, splits

IMAGES = encoded(12)


def pack(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def classes_of(prefix: str = "", count: int = 12) -> dict[str, bytes]:
    return {f"{prefix}{'cat' if i % 2 else 'dog'}/{i}.png": IMAGES[i % 12] for i in range(count)}


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_members_are_read_as_they_were_packed(method: int, tmp_path: Path) -> None:
    pack(tmp_path / "a.zip", classes_of(), method)
    found, items = opened(tmp_path, 5)
    assert found.source == "zip" and found.listing.classes == ("cat", "dog")
    assert {i.path: (i.data, i.label) for i in items} == {
        f"a.zip/{name}": (data, name.split("/")[0]) for name, data in classes_of().items()
    }
    assert labels(tmp_path / "a.zip") == {i.path: i.label for i in items}
    for part in found.listing.parts:
        whole = list(part.read())
        assert list(part.read([len(whole) - 1, 0])) == [whole[-1], whole[0]]
        assert len(whole) <= 10 and pickle.loads(pickle.dumps(part)) == part


@pytest.mark.skipif(not shutil.which("zip"), reason="no zip here")
@pytest.mark.parametrize("options", [["-r"], ["-r", "-0"], ["-r", "-fz"], ["-r", "-D", "-9"]])
def test_archives_of_info_zip(options: list[str], tmp_path: Path) -> None:
    put(tmp_path / "in", "data/cat/1.png", "data/dog/a b.png", "data/dog/x.gif")
    subprocess.run(["zip", "-q", *options, tmp_path / "out.zip", "data"], cwd=tmp_path / "in", check=True)
    assert labels(tmp_path / "out.zip") == {
        "out.zip/data/cat/1.png": "cat",
        "out.zip/data/dog/a b.png": "dog",
        "out.zip/data/dog/x.gif": "dog",
    }


def test_many_archives_and_a_streamed_one(tmp_path: Path) -> None:
    for number in range(3):
        pack(tmp_path / f"{number}.zip", classes_of(f"wrap{number}/"))
    with (
        (tmp_path / "s.zip").open("wb") as file,
        zipfile.ZipFile(_Stream(file), "w") as archive,
    ):  # a streamed archive stores sizes behind the members
        archive.writestr("cat/1.png", PNG)
    found, items = opened(tmp_path)
    assert len(items) == 37 and Counter(i.label for i in items) == {"cat": 19, "dog": 18}
    assert len(found.listing.parts) == 4


class _Stream:
    """A file without seek."""

    def __init__(self, file: object) -> None:
        self.write, self.flush = file.write, file.flush  # type: ignore[attr-defined]


# Classes, splits and labels.


@pytest.mark.parametrize(
    "names, expected",
    [
        (["cat/1.png", "dog/2.png"], ["cat", "dog"]),
        (["a/b/cat/1.png", "a/b/dog/2.png"], ["cat", "dog"]),
        (["a/cat/x/1.png", "a/dog/2.png"], ["cat/x", "dog"]),
        (["1.png", "2.png"], [None, None]),
        (["1.png", "cat/2.png"], [None, "cat"]),
        (["w/1.png", "w/cat/2.png"], [None, "cat"]),
        (["cat/1.png", "cat/2.png"], ["cat", "cat"]),
        (["w/cat/1.png", "w/cat/2.png"], ["cat", "cat"]),
    ],
)
def test_classes_are_folders_without_those_around_all(
    names: list[str], expected: list[str | None], tmp_path: Path
) -> None:
    pack(tmp_path / "a.zip", dict.fromkeys(names, PNG))
    assert labels(tmp_path) == {f"a.zip/{name}": label for name, label in zip(names, expected, strict=True)}
    assert set(labels(tmp_path, label_column="none").values()) == {None}


@pytest.mark.parametrize("inside", ["", "{}/", "x/{}/", "{}2017/"])
def test_archives_may_be_splits(inside: str, tmp_path: Path) -> None:
    for split, count in (("train", 12), ("val", 4)):
        pack(tmp_path / f"{split}2017.zip", classes_of(inside.format(split), count))
    found, items = opened(tmp_path, 4)
    assert splits(found) == {"train": 12, "validation": 4}
    assert Counter(item.label for item in items) == {"cat": 8, "dog": 8}


def test_a_folder_called_as_its_archive_is_no_class(tmp_path: Path) -> None:
    for split in ("train2017", "val2017"):
        pack(tmp_path / f"{split}.zip", {f"{split}/{i}.png": data for i, data in enumerate(IMAGES)})
    found, items = opened(tmp_path)
    assert {item.label for item in items} == {None} and splits(found) == {"train": 12, "validation": 12}


def test_folders_in_an_archive_may_be_splits(tmp_path: Path) -> None:
    pack(
        tmp_path / "test_data.zip",
        {**classes_of("d/train/"), **classes_of("d/test/", 4), "d/extra/1.png": PNG, "1.txt": b"x"},
    )
    found, items = opened(tmp_path, 5)
    assert splits(found) == {"train": 12, "test": 4}
    assert Counter(item.label for item in items) == {"cat": 8, "dog": 8}
    assert found.listing.ignored == {
        "test_data.zip/d/extra/1.png": "lies beside the splits test, train, in none of them",
        "test_data.zip/1.txt": "not an image",
    }


def test_edms_archives(tmp_path: Path) -> None:
    names = [f"{i // 5:05d}/img{i:08d}.png" for i in range(12)]
    content = json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names)]}).encode()
    pack(
        tmp_path / "a.zip",
        {**dict(zip(names, IMAGES, strict=True)), "dataset.json": content},
        zipfile.ZIP_STORED,
    )
    assert labels(tmp_path) == {f"a.zip/{name}": str(i % 3) for i, name in enumerate(names)}
    assert opened(tmp_path)[0].listing.classes == ("0", "1", "2")
    pack(tmp_path / "a.zip", {**dict(zip(names, IMAGES, strict=True)), "dataset.json": b'{"labels": null}'})
    assert labels(tmp_path) == {f"a.zip/{name}": None for name in names}


def test_metadata_in_an_archive(tmp_path: Path) -> None:
    table = b"file_name,label\n1.png,cat\n2.png,dog\n3.png,cat\n"
    pack(tmp_path / "a.zip", {"w/1.png": PNG, "w/2.png": PNG, "w/4.png": PNG, "w/metadata.csv": table})
    found, items = opened(tmp_path)
    assert {i.path: i.label for i in items} == {"a.zip/w/1.png": "cat", "a.zip/w/2.png": "dog"}
    assert found.listing.bad == {"a.zip/w/3.png": "listed in metadata.csv, but missing"}
    assert found.listing.ignored == {"a.zip/w/4.png": "not listed in metadata.csv"}
    put(tmp_path, "metadata.csv", data=table)
    assert opened(tmp_path)[0].listing.ignored["metadata.csv"] == "lies beside the archives, not in one"
    pack(tmp_path / "a.zip", {"1.png": PNG, "metadata.jsonl": b"{"})
    with pytest.raises(InputError, match=r"a\.zip/metadata\.jsonl: line 1"):
        opened(tmp_path)


def test_an_archive_beside_image_files(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "cat/2.png")
    pack(tmp_path / "docs.zip", {"a.txt": b"words" * 10_000, "b.txt": b"more"}, zipfile.ZIP_STORED)
    found, items = opened(tmp_path)
    assert not is_zip(open_tree(str(tmp_path))) and found.source == "folder" and len(items) == 2
    assert found.listing.ignored == {"docs.zip": "an archive beside --source folder"}
    pack(tmp_path / "all.zip", classes_of(count=60), zipfile.ZIP_STORED)
    found, items = opened(tmp_path)
    assert found.source == "zip" and len(items) == 60
    assert found.listing.ignored == {
        "docs.zip": "holds no images",
        "cat/1.png": "images beside --source zip",
        "cat/2.png": "images beside --source zip",
    }
    (tmp_path / "all.zip").write_bytes((tmp_path / "all.zip").read_bytes()[:-40])
    with pytest.raises(InputError, match=r"all\.zip: damaged or cut short"):
        opened(tmp_path)


def test_parts_are_mixed_and_know_where_their_images_were(tmp_path: Path) -> None:
    members = {f"{c}/{i:03d}.png": encode(picture(i)) for c in ("a", "b", "c") for i in range(50)}
    pack(tmp_path / "a.zip", members)
    few, many = (open_source("zip", str(tmp_path), Request(size)).listing.parts for size in (40, 20))
    assert len(many) > len(few) > 1
    for part in many:
        assert isinstance(part, ZipPart) and len(set(part.labels)) == 3 and len(pickle.dumps(part)) < 4000
        (before,) = [other for other in few if part.slot.startswith(other.slot)]
        assert isinstance(before, ZipPart) and set(part.members) <= set(before.members)


def test_a_remote_archive_is_read_in_stretches(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    members = {f"{c}/{i:03d}.png": PNG + bytes([i]) * 20_000 for c in ("cat", "dog") for i in range(40)}
    path = pack(tmp_path / "a.zip", {**members, "x/unknown": PNG, "notes.txt": b"words"}, zipfile.ZIP_STORED)
    fs, place = storage.open_fs(bucket)
    fs.put_file(str(path), f"{place}/z/a.zip")
    found, items = opened(f"{bucket}/z", 10)
    assert {i.path.removeprefix("a.zip/"): i.data for i in items} == {**members, "x/unknown": PNG}
    assert found.listing.ignored == {"a.zip/notes.txt": "not an image"}
    part, asked = found.listing.parts[0], list[int]()
    stretch = zip_members.read_stretch

    def counting(uri: str, start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return stretch(uri, start, stop)

    monkeypatch.setattr(zip_members, "read_stretch", counting)
    whole = list(part.read())
    assert len(asked) == len(whole) and sum(asked) < len(whole) * 22_000
    asked.clear()
    assert list(part.read([1])) == [whole[1]] and len(asked) == 1
    fs.rm_file(f"{place}/z/a.zip")
    assert {item.reason for item in part.read()} == {"can't be read: it no longer exists"}
