"""A few images or other files beside a source of another kind."""

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import Source
from pipeline.data.index import open_splits
from tests.data.common import encoded, tar_bytes, write_folder
from tests.data.reading import opened, put, splits
from tests.data.tables import write
from tests.data.test_binaries import grey, write_pair

IMAGES = encoded(24)
SHAPES: dict[str, dict[str, str]] = {
    "train + test": {"train/cat": "train", "train/dog": "train", "test/cat": "test", "test/dog": "test"},
    "train alone": {"train/cat": "train", "train/dog": "train"},
    "val + test": {"val/cat": "validation", "val/dog": "validation", "test/cat": "test", "test/dog": "test"},
    "in classes": {"cat/train": "train", "dog/train": "train", "cat/test": "test", "dog/test": "test"},
    "deeper": {"w/train/cat": "train", "w/train/dog": "train", "w/val/cat": "validation", "w/val/dog": "validation"},
    "doubled": {"train/train/cat": "train", "train/train/dog": "train", "test/cat": "test", "test/dog": "test"},
}  # fmt: skip


def tree(shape: dict[str, str]) -> dict[str, bytes]:
    """Return names and contents of files, spread over the folders of `shape`."""
    folders = list(shape)
    return {f"{folders[i % len(folders)]}/{i}.png": data for i, data in enumerate(IMAGES)}


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strays", [("fig.png",), ("fig.png", "logo.jpg")])
def test_stray_images_hide_neither_splits_nor_classes(
    kind: str, shape: str, strays: tuple[str, ...], tmp_path: Path
) -> None:
    files = tree(SHAPES[shape]) | dict.fromkeys(strays, encoded(99)[98])
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            put(tmp_path, name, data=data)
    found, items = opened(tmp_path, split=("all",) if shape != "val + test" else ("test",))
    assert splits(found) == Counter(
        SHAPES[shape][f"{name.rpartition('/')[0]}"] for name in files if "/" in name
    )
    assert {item.label for item in items} == {"cat", "dog"} and len(items) == len(IMAGES)
    stem = "all.zip/" if kind == "zip" else ""
    assert {name: reason.partition(" the splits")[0] for name, reason in found.listing.ignored.items()} == {
        f"{stem}{name}": "lies beside" for name in strays
    }


def test_a_stray_image_inside_of_a_split_has_no_label(tmp_path: Path) -> None:
    for name, data in tree(SHAPES["doubled"]).items():
        put(tmp_path, name, data=data)
    put(tmp_path, "train/stray.png", data=encoded(99)[98])
    found, items = opened(tmp_path)
    assert {item.path: item.label for item in items if item.label not in ("cat", "dog")} == {
        "train/stray.png": None
    }
    assert splits(found) == {"train": 13, "test": 12}


@pytest.mark.parametrize("kind", ["folder", "zip", "wrapped zip"])
def test_a_stray_image_beside_classes_has_no_label(kind: str, tmp_path: Path) -> None:
    top = "w/" if kind == "wrapped zip" else ""
    files = {f"{top}{'cat' if i % 2 else 'dog'}/{i}.png": data for i, data in enumerate(IMAGES[:20])}
    files["stray.png"] = IMAGES[20]
    if kind == "folder":
        for name, data in files.items():
            put(tmp_path, name, data=data)
    else:
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    assert Counter(item.label for item in opened(tmp_path)[1]) == {"cat": 10, "dog": 10, None: 1}
    raw = open_splits(str(tmp_path))
    assert {index.image.classes for index in raw.indexes.values()} == {("cat", "dog")}
    assert sum(index.rows for index in raw.indexes.values()) == 21


def test_loose_images_that_are_more_than_those_in_folders_are_no_strays(tmp_path: Path) -> None:
    put(tmp_path, "train/a.png", "train/b.png", *(f"{i}.png" for i in range(5)))
    found, items = opened(tmp_path)
    assert len(items) == 7 and splits(found) == {"": 7}
    assert not found.listing.ignored


def tars(root: Path, images: list[bytes]) -> None:
    put(root, "a.tar", data=tar_bytes(images))


def parquet(root: Path, images: list[bytes]) -> None:
    write(root / "a.parquet", {"image": pa.array(images, pa.binary())})


def arrow(root: Path, images: list[bytes]) -> None:
    table = pa.table({"image": pa.array(images, pa.binary())})
    with pa.OSFile(str(root / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def idx(root: Path, images: list[bytes]) -> None:
    count = len(images)
    write_pair(root, ("images-idx3-ubyte", "labels-idx1-ubyte"), grey(count, 20, 20), np.arange(count) % 3)


def cifar(root: Path, images: list[bytes]) -> None:
    put(root, "data_batch_1.bin", data=bytes(3073 * len(images)))


def npz(root: Path, images: list[bytes]) -> None:
    np.savez(root / "a.npz", arr_0=grey(len(images), 20, 20))


def archive(root: Path, images: list[bytes]) -> None:
    with zipfile.ZipFile(root / "a.zip", "w") as file:
        for i, data in enumerate(images):
            file.writestr(f"{i}.png", data)


WRITERS: dict[Source, Any] = {
    "webdataset": tars, "huggingface": parquet, "arrow": arrow, "idx": idx, "cifar": cifar, "npz": npz, "zip": archive,
}  # fmt: skip


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("loose", [1, 24 * 40])
def test_the_source_is_what_most_of_the_images_are(source: Source, loose: int, tmp_path: Path) -> None:
    write_folder(tmp_path, [IMAGES[i % 24] for i in range(loose)])
    WRITERS[source](tmp_path, IMAGES)
    found, items = opened(tmp_path, 1000)
    if loose == 1:
        assert found.source == source and len(items) == len(IMAGES)
        assert found.listing.ignored == {"cat/0000.png": f"images beside --source {source}"}
    else:
        assert found.source == "folder" and len(items) == loose
        assert all(reason.endswith("beside --source folder") for reason in found.listing.ignored.values())
        assert len(found.listing.ignored) == (2 if source == "idx" else 1)
    assert f"is {found.source}: " in open_splits(str(tmp_path), 12).found
    assert opened(tmp_path, 1000, source)[0].source == source


def test_images_that_a_table_names_belong_to_it_however_many_they_are(tmp_path: Path) -> None:
    write_folder(tmp_path, IMAGES)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    cells = [{"bytes": None, "path": name} for name in names]
    write(
        tmp_path / "a.parquet",
        {"image": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))},
    )
    found, items = opened(tmp_path)
    assert found.source == "huggingface" and sorted(item.data for item in items) == sorted(IMAGES)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("README.md", "not an image: it is about the data"),
        ("LICENSE", "not an image: it is about the data"),
        ("readme.html", "not an image: it is about the data"),
        ("SHA256SUMS", "not an image: it is about the data"),
        ("notes.txt", "not an image"),
        ("coarse_label_names.txt", "names of the coarse classes; the fine classes are used"),
        ("batches.meta.txt", "class names without a data file beside them"),
        ("meta", "class names in a pickle, which is never opened"),
    ],
)
def test_what_else_lies_beside_cifar_is_called_what_it_is(name: str, reason: str, tmp_path: Path) -> None:
    put(tmp_path, "train.bin", data=bytes(3074 * 3))
    put(tmp_path, "fine_label_names.txt", data="\n".join(map(str, range(100))).encode())
    put(tmp_path, name, data=b"words")
    found, _ = opened(tmp_path)
    assert found.source == "cifar" and found.listing.ignored == {name: reason}
