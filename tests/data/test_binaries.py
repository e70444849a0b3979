"""IDX files, MNIST's format, and CIFAR's binary files."""

import gzip
import pickle
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.sources.cifar import is_cifar
from pipeline.data.sources.idx import is_idx
from pipeline.data.sources.parts import Item, Request
from pipeline.data.sources.registry import open_source
from pipeline.data.sources.tree import open_tree
from pipeline.errors import InputError
from tests.data.common import write_idx
from tests.data.reading import labels, opened, put, splits

RNG = np.random.default_rng(0)


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    """Return an IDX file as MNIST's authors define it."""
    return struct.pack(f">HBB{values.ndim}I", 0, kind, values.ndim, *values.shape) + values.tobytes()


def grey(count: int = 20, height: int = 7, width: int = 7) -> np.ndarray:
    return RNG.integers(0, 256, (count, height, width), dtype=np.uint8)


def pixels(items: list[Item]) -> np.ndarray:
    return np.stack([item.data for item in items if isinstance(item.data, np.ndarray)])


NAMES = [
    ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"),
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"),
    ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
    ("train-images.idx3-ubyte", "train-labels-idx1-ubyte"),
    ("emnist-letters-train-images-idx3-ubyte.gz", "emnist-letters-train-labels-idx1-ubyte.gz"),
    ("images-idx3-ubyte", "labels-idx1-ubyte"),
    ("all-images-images-idx3-ubyte", "all-images-labels-idx1-ubyte"),
]


def write_pair(folder: Path, names: tuple[str, str], values: np.ndarray, numbers: np.ndarray) -> Path:
    for name, content in zip(names, (idx(values), idx(numbers.astype(np.uint8))), strict=True):
        put(folder, name, data=gzip.compress(content) if name.endswith(".gz") else content)
    return folder


@pytest.mark.parametrize("folder", ["mnist", "images", "a/images-idx3/labels"])
@pytest.mark.parametrize("names", NAMES, ids=str)
def test_labels_are_found_by_the_name_of_the_file(
    names: tuple[str, str], folder: str, tmp_path: Path
) -> None:
    values, numbers = grey(), np.arange(20) % 4
    write_pair(tmp_path / folder, names, values, numbers)
    for root in (tmp_path, tmp_path / folder):
        found, items = opened(root, 6)
        assert found.source == "idx" and (pixels(items)[..., 0] == values).all()
        assert [item.label for item in items] == [str(n) for n in numbers]
        listing = found.listing
        assert (listing.size, listing.channels, listing.classes) == (7, 1, ("0", "1", "2", "3"))
        assert len(listing.parts) == 4 and not listing.ignored
    assert items[3].path == f"{names[0]}/000003.png"


def test_idx_parts_are_small_and_read_by_position(tmp_path: Path) -> None:
    for name in ("train-images-idx3-ubyte.gz", "train-images-idx3-ubyte"):
        values = grey(50)
        folder = put(
            tmp_path / name, name, data=gzip.compress(idx(values)) if name.endswith("gz") else idx(values)
        )
        part = open_source("idx", str(folder), Request(20)).listing.parts[1]
        assert pickle.loads(pickle.dumps(part)) == part and len(pickle.dumps(part)) < 800
        assert (pixels(list(part.read([19, 0, 1, 0])))[..., 0] == values[[39, 20, 21, 20]]).all()


def test_splits_sizes_and_several_folders(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist", grey(12), np.arange(12) % 3)
    write_pair(
        tmp_path / "mnist", ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"), grey(5), np.full(5, 5)
    )
    found, items = opened(tmp_path)
    assert splits(found) == {"train": 12, "test": 5} and found.listing.classes == tuple("012345")
    put(tmp_path, "other/t10k-images-idx3-ubyte", data=idx(grey(3, 4, 9)))
    put(tmp_path, "other/t10k-labels-idx3-ubyte", "labels-idx1-ubyte", data=b"x")
    found, items = opened(tmp_path)
    assert found.listing.size == 0 and Counter(item.label for item in items)[None] == 3
    words = "labels without a file of images"
    assert found.listing.ignored == {"other/t10k-labels-idx3-ubyte": words, "labels-idx1-ubyte": words}
    assert {item.label for item in opened(tmp_path, label_column="none")[1]} == {None}


def test_a_file_and_its_packed_copy_are_one(tmp_path: Path) -> None:
    write_pair(tmp_path, NAMES[0], grey(6), np.arange(6))
    write_pair(tmp_path, NAMES[1], grey(6), np.arange(6))
    found, items = opened(tmp_path)
    assert [item.label for item in items] == list("012345")
    assert found.listing.ignored == {
        "train-images-idx3-ubyte.gz": "packed copy of train-images-idx3-ubyte",
        "train-labels-idx1-ubyte.gz": "packed copy of train-labels-idx1-ubyte",
    }


GOOD = idx(grey(4))
FAULTS: dict[str, tuple[bytes | None, bytes | None, str]] = {
    "floats": (idx(grey(4).astype(">f4"), 13), None, "begins with 3331"),
    "four dimensions": (idx(grey(4)[..., None]), None, "begins with 2052"),
    "labels": (idx(np.zeros(4, np.uint8)), None, "not an IDX file of 8-bit images"),
    "empty": (b"", None, "cut short"),
    "header": (GOOD[:15], None, "cut short"),
    "cut": (GOOD[:-1], None, "cut short: 211 bytes, 212 expected"),
    "long": (GOOD + b"x", None, "longer than its header says"),
    "no pixels": (idx(grey(4, 0, 7)), None, "0x7 pixels"),
    "web page": (b"<html>404 not found</html>", None, "not an IDX file of 8-bit images"),
    "fewer labels": (None, idx(np.zeros(3, np.uint8)), "3 labels for the 4 images"),
    "more labels": (None, idx(np.zeros(5, np.uint8)), "5 labels for the 4 images"),
    "other labels": (None, idx(np.zeros(4, ">i4"), 12), "not an IDX file of 8-bit labels"),
    "labels' header cut": (None, idx(np.zeros(4, np.uint8))[:6], "cut short"),
    "labels cut": (None, idx(np.zeros(4, np.uint8))[:-1], "3 labels or more, 4 expected"),
    "labels long": (None, idx(np.zeros(4, np.uint8)) + b"x", "5 labels or more, 4 expected"),
    "no labels": (None, b"", "not an IDX file of 8-bit labels"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_idx_files_that_make_no_sense_are_refused_in_one_line(
    fault: str, packed: bool, tmp_path: Path
) -> None:
    values, numbers, words = FAULTS[fault]
    pack: Callable[[bytes], bytes] = gzip.compress if packed else bytes
    put(tmp_path, "x-images-idx3-ubyte", data=pack(GOOD if values is None else values))
    put(
        tmp_path, "x-labels-idx1-ubyte", data=pack(idx(np.zeros(4, np.uint8)) if numbers is None else numbers)
    )
    with pytest.raises(InputError, match=words) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value) and "idx" in str(error.value)


@pytest.mark.parametrize("name", ["x-images-idx3-ubyte.gz", "x-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "no end", "more"])
def test_damaged_gzip_files_are_refused_in_one_line(name: str, damage: str, tmp_path: Path) -> None:
    write_pair(tmp_path, ("x-images-idx3-ubyte.gz", "x-labels-idx1-ubyte.gz"), grey(500), np.arange(500) % 9)
    whole = bytearray((tmp_path / name).read_bytes())
    if damage == "flipped":
        whole[-5] ^= 0xFF  # a byte of the checksum
    cut = {"cut": whole[: len(whole) // 2], "no end": whole[:-4], "more": whole + b"rubbish"}
    put(tmp_path, name, data=bytes(cut.get(damage, whole)))
    with pytest.raises(InputError, match=rf"{name}: (damaged|holds|cut short)"):
        opened(tmp_path)


def test_labels_that_are_there_and_lead_nowhere_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "train-images-idx3-ubyte", data=GOOD)
    (tmp_path / "train-labels-idx1-ubyte").symlink_to("nothing")
    with pytest.raises(InputError, match="a link to nothing: this file holds labels"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["images/a.png", "idx3.png", "my-images.bin", "train-labels-idx1-ubyte"])
def test_other_names_are_no_idx_files(name: str, tmp_path: Path) -> None:
    assert not is_idx(open_tree(str(put(tmp_path, name))))


# CIFAR.

TEN = tuple(f"class{i}" for i in range(10))


def cifar(count: int, heads: int = 1, classes: int = 10) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Return records as CIFAR's authors define them (labels, then red, green and blue planes), pixels and labels."""
    values = RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    numbers = np.arange(count) % classes
    planes = values.transpose(0, 3, 1, 2).reshape(count, 3072)
    columns = [np.full((count, heads - 1), 19), numbers[:, None], planes]
    return np.concatenate(columns, 1).astype(np.uint8).tobytes(), values, numbers


def write_cifar(
    root: Path, names: str | None = "\n".join(TEN) + "\n\n"
) -> tuple[Path, dict[str, np.ndarray]]:
    contents = dict[str, np.ndarray]()
    for number, name in enumerate(("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")):
        data, contents[name], _ = cifar(20 + number)
        put(root, name, data=data)
    if names is not None:
        put(root, "batches.meta.txt", data=names.encode())
    return put(root, "readme.html", data=b"<html>"), contents


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin"])
def test_cifar_10(folder: str, tmp_path: Path) -> None:
    contents = write_cifar(tmp_path / folder)[1]
    found, items = opened(tmp_path, 8)
    assert found.source == "cifar" and (pixels(items) == np.concatenate(list(contents.values()))).all()
    assert [item.label for item in items[:41]] == [f"class{i % 10}" for i in [*range(20), *range(21)]]
    listing = found.listing
    assert (listing.size, listing.channels, listing.classes) == (32, 3, TEN)
    assert splits(found) == {"train": 41, "test": 22}
    assert [name.rsplit("/")[-1] for name in listing.ignored] == ["readme.html"]
    part = listing.parts[1]
    whole = list(part.read())
    assert [(i.path, i.label) for i in part.read([7, 0])] == [(whole[r].path, whole[r].label) for r in (7, 0)]
    assert pickle.loads(pickle.dumps(part)) == part and len(pickle.dumps(part)) < 800
    assert {item.label for item in opened(tmp_path, label_column="none")[1]} == {None}


def test_cifar_10_without_names(tmp_path: Path) -> None:
    write_cifar(tmp_path, None)
    found, items = opened(tmp_path)
    assert found.listing.classes == tuple("0123456789") and items[13].label == "3"


@pytest.mark.parametrize("named", [True, False])
def test_cifar_100_has_fine_labels(named: bool, tmp_path: Path) -> None:
    values = list[np.ndarray]()
    for name, count in (("train.bin", 30), ("test.bin", 7)):
        data, some, _ = cifar(count, 2, 100)
        values.append(some)
        put(tmp_path, name, data=data)
    if named:
        put(tmp_path, "fine_label_names.txt", data="".join(f"fine{i}\n" for i in range(100)).encode())
        put(tmp_path, "coarse_label_names.txt", data="".join(f"coarse{i}\n" for i in range(20)).encode())
    found, items = opened(tmp_path, 10)
    assert (pixels(sorted(items, key=lambda item: "test" in item.path)) == np.concatenate(values)).all()
    train = [item.label for item in items if item.path.startswith("train")]
    assert train == [f"{'fine' if named else ''}{i}" for i in range(30)]
    assert splits(found) == {"train": 30, "test": 7} and len(found.listing.classes or ()) == 100


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: d[:3000], lambda d: b""])
@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin", "train.bin"])
def test_sizes_that_make_no_sense_are_refused(
    name: str, change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    kind: dict[str, Any] = {"heads": 2, "classes": 100} if name == "train.bin" else {}
    put(tmp_path, name, data=change(cifar(5, **kind)[0]))
    put(tmp_path, "fine_label_names.txt", data="".join(f"fine{i}\n" for i in range(100)).encode())
    with pytest.raises(InputError, match=rf"{name}: cut short, or not a CIFAR-(10|100) file: \d+ bytes"):
        opened(tmp_path)


def test_labels_beyond_the_classes(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cat\ndog\nowl\n")
    found, items = opened(tmp_path)
    assert found.listing.classes == ("cat", "dog", "owl")
    assert Counter(item.label for item in items if not item.reason) == {"cat": 8, "dog": 7, "owl": 6}
    assert {item.reason for item in items if item.label is None} == {
        f"label {i} is not among the 3 classes" for i in range(3, 10)
    }
    (tmp_path / "data_batch_1.bin").write_bytes(b"\x89" + bytes(3072))
    with pytest.raises(InputError, match="its first image has label 137"):
        opened(tmp_path)


@pytest.mark.parametrize("names", ["cat\ncat\n", "", "\n\n"])
def test_names_of_classes_must_be_names(names: str, tmp_path: Path) -> None:
    write_cifar(tmp_path, names)
    with pytest.raises(InputError, match=r"batches\.meta\.txt: must name each class once"):
        opened(tmp_path)


def test_cifar_10_and_100_together_are_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path / "a")
    put(tmp_path, "b/train.bin", data=cifar(5, 2)[0])
    with pytest.raises(InputError, match="holds CIFAR-10 and CIFAR-100"):
        opened(tmp_path)
    assert len(labels(tmp_path / "a")) == 63


@pytest.mark.parametrize("name", ["train.bin", "test.bin", "data.bin", "data_batch_1", "weights/test.bin"])
def test_other_binary_files_are_not_cifars(name: str, tmp_path: Path) -> None:
    put(tmp_path, name, data=bytes(50_000))
    put(tmp_path, "cat/1.png")
    assert not is_cifar(open_tree(str(tmp_path))) and labels(tmp_path) == {"cat/1.png": "cat"}


def test_cifars_pickles_are_not_opened(tmp_path: Path) -> None:
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        put(tmp_path, name, data=pickle.dumps({b"data": [0]}))
    with pytest.raises(InputError, match="use its binary version"):
        opened(tmp_path)
