"""Parquet files of other programs: tables without images, differing files, names, splits and parts."""

import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.sources import parquet
from pipeline.data.sources.parquet import is_parquet, list_parquet
from pipeline.data.sources.parts import Request
from pipeline.data.sources.tree import open_tree
from pipeline.errors import InputError
from tests.data.common import write_parquet
from tests.data.tables import (
    COUNT,
    IMAGE,
    IMAGES,
    NUMBERS,
    STRUCT,
    WORDS,
    binary,
    class_label,
    features,
    items,
    listed,
    listing,
    structs,
    write,
)  # fmt: skip

SIDE = "Parquet without an image column"


def test_datasets_reads_the_same(tmp_path: Path) -> None:
    from datasets import Image, load_dataset

    write_parquet(tmp_path / "data", IMAGES, rows_per_group=3, files=3)
    theirs = load_dataset(
        "parquet", data_files=str(tmp_path / "data" / "*.parquet"), cache_dir=str(tmp_path / "cache")
    )
    rows = theirs["train"].cast_column("image", Image(decode=False))
    names = rows.features["label"].names
    found = listing(tmp_path / "data", 4)
    assert found.classes == tuple(names)
    assert [(i.data, i.label) for i in items(found)] == [
        (r["image"]["bytes"], names[r["label"]]) for r in rows
    ]


@pytest.mark.parametrize(
    "columns",
    [
        {"url": ["http://x/y.jpg"] * COUNT, "caption": WORDS},
        {"embedding": pa.array(np.zeros((COUNT, 4)).tolist(), pa.list_(pa.float32(), 4))},
        {"hash": [b"0123456789abcdef"] * COUNT, "key": WORDS},
        {"audio": pa.array([{"path": "a.wav"}] * COUNT), "text": WORDS},
        {"pixels": [[0, 1, 2]] * COUNT, "label": NUMBERS},
    ],
)
def test_side_files_are_no_data(tmp_path: Path, columns: dict[str, Any]) -> None:
    write(tmp_path / "00000.parquet", columns)
    write(tmp_path / "00001.parquet", {name: column[:0] for name, column in columns.items()})
    assert not is_parquet(open_tree(str(tmp_path)))
    write(tmp_path / "b" / "train.parquet", {"image": structs(), "label": NUMBERS})
    found = listing(tmp_path)
    assert [item.data for item in items(found)] == IMAGES
    assert found.ignored == {"00000.parquet": SIDE, "00001.parquet": "holds no rows"}
    assert found.used == {"b/train.parquet"} and not found.bad


@pytest.mark.parametrize("name", ["image", "img", "anything"])
def test_files_that_differ_have_the_same_columns_or_are_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "0.parquet", {name: structs(), "label": NUMBERS}, features(**{name: IMAGE}))
    write(tmp_path / "1.parquet", {"n": NUMBERS, name: binary(), "label": list(map(str, NUMBERS))})
    write(tmp_path / "2.parquet", {name: listed(pa.list_)})
    write(tmp_path / "3.parquet", {name: pa.array([], pa.binary())})
    write(tmp_path / "4.parquet", {"scan": structs(), "label": NUMBERS})
    found = listing(tmp_path)
    assert [item.data for item in items(found)] == IMAGES * 3
    assert [item.label for item in items(found)] == [*map(str, NUMBERS)] * 2 + [None] * COUNT
    assert found.classes == ("0", "1")
    assert found.used == {f"{i}.parquet" for i in range(3)}
    assert found.ignored == {
        "3.parquet": "holds no rows",
        "4.parquet": f"Parquet that has its images in scan, the other files in {name}",
    }
    assert len({item.path for item in items(found)}) == 3 * COUNT


@pytest.mark.parametrize(
    ("second", "classes", "labels"),
    [
        (({"label": NUMBERS}, None), ("x", "y"), ["x", "y"]),
        (({"label": NUMBERS}, features(label=class_label("y", "z"))), ("x", "y", "z"), ["y", "z"]),
        (({"label": ["y", "w"] * (COUNT // 2)}, None), ("x", "y", "w"), ["y", "w"]),
        (({"n": NUMBERS}, None), ("x", "y"), [None, None]),
    ],
)
def test_classes_of_files_that_name_them_differently(
    tmp_path: Path, second: tuple[dict[str, Any], Any], classes: tuple[str, ...], labels: list[str | None]
) -> None:
    write(
        tmp_path / "0.parquet", {"image": structs(), "label": NUMBERS}, features(label=class_label("x", "y"))
    )
    write(tmp_path / "1.parquet", {"image": structs(), **second[0]}, second[1])
    found = listing(tmp_path)
    assert found.classes == classes
    assert [item.label for item in items(found)] == [*["x", "y"] * (COUNT // 2), *labels * (COUNT // 2)]


def test_labels_in_columns_of_two_names_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", {"image": structs(), "label": NUMBERS})
    write(tmp_path / "1.parquet", {"image": structs(), "class": NUMBERS})
    with pytest.raises(
        InputError, match=r"^columns label and class of different files hold labels: give --label"
    ):
        listing(tmp_path)
    assert [item.label for item in items(listing(tmp_path, label_column="class"))] == [None] * COUNT + [
        *map(str, NUMBERS)
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a Parquet file: "),
        (b"PAR1 and nothing else", "not a Parquet file: "),
        (b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1", "not a Parquet file: "),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
            "not a Parquet file but a Git LFS pointer",
        ),
    ],
)
def test_a_file_that_is_none_is_bad_and_the_others_are_read(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    bad = tmp_path / "1.parquet"
    bad.write_bytes(content)
    tree = open_tree(str(tmp_path))
    assert is_parquet(tree)
    assert list_parquet(tree, Request(5)).bad["1.parquet"].startswith(reason)
    write(tmp_path / "0.parquet", {"image": structs()})
    found = listing(tmp_path)
    assert list(found.bad) == ["1.parquet"] and str(tmp_path) not in found.bad["1.parquet"]
    assert [item.data for item in items(found)] == IMAGES
    (tmp_path / "0.parquet").unlink()
    write(tmp_path / "0.parquet", {"caption": WORDS})
    assert not is_parquet(open_tree(str(tmp_path)))  # two side files, one of them damaged


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "can't be read: permission denied"),
        (FileNotFoundError(2, "No such file or directory"), "can't be read: it no longer exists"),
        (PermissionError("Access Denied"), "can't be read: permission denied"),
    ],
)
def test_a_file_that_may_not_be_read_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str
) -> None:
    for name in ("0.parquet", "1.parquet"):
        write(tmp_path / name, {"image": structs()})
    read = parquet.open_parquet

    def refuse(uri: str, piecewise: bool = False) -> pq.ParquetFile:
        if uri.endswith("1.parquet"):
            raise error
        return read(uri, piecewise)

    monkeypatch.setattr(parquet, "open_parquet", refuse)
    found = listing(tmp_path)
    assert found.bad == {"1.parquet": reason} and len(items(found)) == COUNT


def test_rows_without_an_image_and_rows_with_several(tmp_path: Path) -> None:
    cells: list[Any] = [[IMAGES[0]], [], None, [IMAGES[1], IMAGES[2]], [None], [IMAGES[3]]]
    write(
        tmp_path / "a.parquet",
        {"images": pa.array(cells, pa.list_(pa.binary())), "label": [0, 1, 2, 3, 4, 5]},
    )
    part = listing(tmp_path).parts[0]
    read = list(part.read())
    assert [(i.path, i.data, i.label) for i in read if not i.reason] == [
        ("a.parquet/0/000000", IMAGES[0], "0"),
        ("a.parquet/0/000003/0", IMAGES[1], "3"),
        ("a.parquet/0/000003/1", IMAGES[2], "3"),
        ("a.parquet/0/000005", IMAGES[3], "5"),
    ]
    assert [(i.path[-6:], i.label) for i in read if i.reason == "the row holds no image"] == [
        ("000001", "1"), ("000002", "2"), ("000004", "4")
    ]  # fmt: skip
    assert list(part.read([6, 3, 0])) == [read[6], read[3], read[0]]
    assert part.table(np.array([6, 3]))["bytes"].to_pylist() == [IMAGES[3], IMAGES[1]]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["cat.png"] * 3, ["000000/cat.png", "000001/cat.png", "000002/cat.png"]),
        (["/home/me/a.png", "C:\\x\\b.png", None], ["000000/a.png", "000001/b.png", "000002"]),
        (["a\nb.png", "\x1b[1m", "ä.png"], ["000000/a\\nb.png", "000001/\\x1b[1m", "000002/ä.png"]),
    ],
)
def test_names_are_printable_unique_and_hold_no_path_of_a_machine(
    tmp_path: Path, paths: list[str | None], expected: list[str]
) -> None:
    cells = [{"bytes": IMAGES[0], "path": path} for path in paths]
    write(tmp_path / "t.parquet", {"image": pa.array(cells, STRUCT)})
    assert [item.path for item in items(listing(tmp_path))] == [f"t.parquet/0/{name}" for name in expected]


def test_text_that_is_no_utf8_has_replacement_characters(tmp_path: Path) -> None:
    raw = pa.array([b"\xffa", b"b"] * (COUNT // 2))
    wrong = pa.StringArray.from_buffers(COUNT, *raw.buffers()[1:])
    image = pa.StructArray.from_arrays([binary(), wrong], ["bytes", "path"])
    write(tmp_path / "a.parquet", {"image": image, "label": wrong})
    found = listing(tmp_path, 100)
    assert found.classes == ("b", "�a")
    assert [item.label for item in items(found)] == ["�a", "b"] * (COUNT // 2)
    assert {item.path[-2:] for item in items(found)} == {"�a", "/b"}
    assert found.parts[0].table(np.array([0, 1]))["path"].to_pylist() == [
        "a.parquet/0/000000/�a",
        "a.parquet/0/000001/b",
    ]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"], ["test", "train"]),
        (["default/test/0000.parquet", "default/train/0000.parquet"], ["test", "train"]),
        (["train.parquet", "valid.parquet"], ["train", "validation"]),
        (["a.parquet", "b.PARQUET"], ["", ""]),
    ],
)
def test_splits_stand_in_names(tmp_path: Path, names: list[str], splits: list[str]) -> None:
    for name in names:
        write(tmp_path / name, {"image": structs()}, row_group_size=5)
    parts = listing(tmp_path, 8).parts
    assert list(dict.fromkeys((part.names[0], part.split) for part in parts)) == list(
        zip(sorted(names), splits, strict=True)
    )
    assert [(part.start, part.count) for part in parts][:4] == [(0, 1), (1, 1), (2, 2), (0, 1)]  # type: ignore[attr-defined]


def test_parts_travel_small(tmp_path: Path) -> None:
    names = [f"class number {i}" for i in range(1000)]
    for number in range(4):
        columns = {"image": structs(), "label": NUMBERS}
        write(tmp_path / f"{number}.parquet", columns, features(label=class_label(*names)), row_group_size=1)
    parts = listing(tmp_path, 2).parts
    assert len(parts) == 4 * COUNT / 2 and pickle.loads(pickle.dumps(parts)) == parts
    assert len(pickle.dumps(parts)) < 25_000 + 100 * len(parts)


def test_files_of_a_remote_store_are_read_alike(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.parquet", {"image": structs(), "label": WORDS}, row_group_size=5)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/there/a/train.parquet", (tmp_path / "a" / "train.parquet").read_bytes())
    tree = open_tree("memory://there")
    assert is_parquet(tree)
    found, local = list_parquet(tree, Request(5)), listing(tmp_path)
    assert items(found) == items(local) and len(items(found)) == COUNT
    assert found.parts[1].table(np.array([2, 0])).equals(local.parts[1].table(np.array([2, 0])))
    memory.rm("/there", recursive=True)
