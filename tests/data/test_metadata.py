"""Labels in files beside images: metadata.*, EDM's dataset.json, and this project's own files."""

import csv
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.index import open_splits
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.data.sources.parts import IMAGE_FOLDER_TABLE
from pipeline.errors import InputError
from tests.data.common import encode, picture
from tests.data.reading import labels, opened, put, splits

ROWS = {"a.png": "cat", "sub/b.png": "dog", "sub/c.png": "cat", "d e,f.png": "owl"}


def write_csv(path: Path, columns: list[str], rows: list[list[Any]], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding, errors="surrogateescape") as file:
        csv.writer(file).writerows([columns, *rows])


def write_jsonl(path: Path, columns: list[str], rows: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))


def write_table(path: Path, columns: list[str], rows: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({c: [row[n] for row in rows] for n, c in enumerate(columns)}), path)


TABLES: dict[str, Callable[..., None]] = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_table}


@pytest.mark.parametrize("kind", TABLES)
def test_metadata_labels_images_as_datasets_reads_it(kind: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    root = tmp_path / "data"
    for n, name in enumerate(ROWS):
        put(root, name, data=encode(picture(n)))
    put(root, "sub/left_out.png", "left_out.png", data=encode(picture(9)))
    TABLES[kind](
        root / f"metadata.{kind}",
        ["file_name", "text", "label"],
        [[k, 'words, "x"\nmore', v] for k, v in ROWS.items()],
    )
    found, items = opened(root)
    assert {item.path: item.label for item in items} == ROWS and found.listing.classes == (
        "cat",
        "dog",
        "owl",
    )
    assert f"metadata.{kind}" in found.listing.used
    assert found.listing.ignored == dict.fromkeys(
        ["left_out.png", "sub/left_out.png"], f"not listed in metadata.{kind}"
    )
    theirs = load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "cache"), split="train")
    pixels = {item.label: 0 for item in items}
    assert Counter(theirs["label"]) == Counter(item.label for item in items) and len(pixels) == 3
    mine = sorted((Image.open(io.BytesIO(i.data)).tobytes(), i.label) for i in items)
    assert mine == sorted((row["image"].tobytes(), row["label"]) for row in theirs)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("label", [None, -1, float("nan")])
def test_labels_that_are_none(kind: str, label: Any, tmp_path: Path) -> None:
    put(tmp_path, "x/a.png", "x/b.png", "x/c.png")
    rows = [["x/a.png", 3], ["x/b.png", 0], ["x/c.png", label]]
    TABLES[kind](tmp_path / f"metadata.{kind}", ["file_name", "label"], rows)
    assert labels(tmp_path) == {"x/a.png": "3", "x/b.png": "0", "x/c.png": None}
    assert opened(tmp_path)[0].listing.classes == ("0", "1", "2", "3")


@pytest.mark.parametrize("kind", TABLES)
def test_what_is_named_and_not_there(kind: str, tmp_path: Path) -> None:
    put(tmp_path, "a.png", "notes.txt", ".hidden.png")
    put(tmp_path, "notes.txt", data=b"words")
    (tmp_path / "link.png").symlink_to("nothing")
    names = ["a.png", "b.png", "sub/c.png", "../up.png", "notes.txt", "link.png", ".hidden.png"]
    TABLES[kind](tmp_path / f"metadata.{kind}", ["file_name", "label"], [[name, "x"] for name in names])
    found, items = opened(tmp_path)
    assert [item.path for item in items] == ["a.png"]
    missing = f"listed in metadata.{kind}, but missing"
    assert found.listing.bad == {
        "b.png": missing,
        "sub/c.png": missing,
        "../up.png": missing,
        "notes.txt": f"listed in metadata.{kind}, but not an image",
        "link.png": "a link to nothing",
    }
    assert found.listing.ignored == {".hidden.png": "hidden"}


def test_each_folder_may_have_metadata_of_its_own(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        names = [f"imgs/{i}.png" for i in range(count)]
        put(tmp_path / split, *names)
        write_csv(
            tmp_path / split / "metadata.csv",
            ["label", "file_name"],
            [[i % 2, n] for i, n in enumerate(names)],
        )
    put(tmp_path, "train/imgs/deep/9.png")
    write_jsonl(
        tmp_path / "train" / "imgs" / "deep" / "metadata.jsonl", ["file_name", "label"], [["9.png", 1]]
    )
    found, items = opened(tmp_path)
    assert {i.path: i.label for i in items} == {
        "train/imgs/0.png": "0", "train/imgs/1.png": "1", "train/imgs/2.png": "0", "train/imgs/3.png": "1",
        "train/imgs/deep/9.png": "1", "test/imgs/0.png": "0", "test/imgs/1.png": "1",
    }  # fmt: skip
    assert splits(found) == {"train": 5, "test": 2} and found.listing.classes == ("0", "1")


def test_the_nearest_metadata_counts(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "a/2.png", "b/3.png")
    write_csv(
        tmp_path / "metadata.csv",
        ["file_name", "label"],
        [["a/1.png", "x"], ["a/2.png", "x"], ["b/3.png", "x"]],
    )
    write_csv(tmp_path / "a" / "metadata.csv", ["file_name", "label"], [["1.png", "y"]])
    assert labels(tmp_path) == {"a/1.png": "y", "a/2.png": "x", "b/3.png": "x"}


def test_other_columns_can_be_chosen(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "1m.png", "2.png", "2m.png")
    columns = ["image_file_name", "mask_file_name", "label", "kind", "text"]
    rows = [["1.png", "1m.png", "x", "p", ""], ["2.png", "2m.png", "y", "q", "2.png"]]
    write_csv(tmp_path / "metadata.csv", columns, rows)
    assert labels(tmp_path) == {"1.png": "x", "1m.png": "x", "2.png": "y", "2m.png": "y"}
    assert set(labels(tmp_path, label_column="kind").values()) == {"p", "q"}
    assert set(labels(tmp_path, label_column="none").values()) == {None}
    chosen = {"image_column": "image_file_name"}
    assert labels(tmp_path, **chosen) == {"1.png": "x", "2.png": "y"}
    ignored = opened(tmp_path, **chosen)[0].listing.ignored
    assert ignored == dict.fromkeys(["1m.png", "2m.png"], "metadata.csv lists it as mask_file_name")
    assert set(labels(tmp_path, image_column="text", label_column="kind")) == {"2.png"}
    for flag in ("label", "image"):
        with pytest.raises(InputError, match=f"--{flag}-column breed"):
            opened(tmp_path, **{f"{flag}_column": "breed"})


def test_metadata_without_labels_leaves_them_to_the_folders(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "dog/2.png")
    write_csv(
        tmp_path / "metadata.csv", ["file_name", "text"], [["cat/1.png", "a cat"], ["dog/3.png", "a dog"]]
    )
    found, items = opened(tmp_path)
    assert {i.path: i.label for i in items} == {"cat/1.png": "cat", "dog/2.png": "dog"}
    assert found.listing.ignored == {"metadata.csv": "has no column label"}
    assert found.listing.bad == {"dog/3.png": "listed in metadata.csv, but missing"}
    (tmp_path / "metadata.csv").write_text("id;age\n1;2\n")
    assert opened(tmp_path)[0].listing.ignored == {"metadata.csv": "has no column file_name; it has id;age"}
    for empty in ("metadata.jsonl", "metadata.csv"):
        (tmp_path / empty).write_text("")
        assert "no column file_name" in opened(tmp_path)[0].listing.ignored[empty]


@pytest.mark.parametrize(
    "cells, expected",
    [
        (["1.0", "", "3.0"], ["1", None, "3"]),
        (["007", "012", "-1"], ["7", "12", None]),
        (["cat", "", "null"], ["cat", None, None]),
        (["1", "cat", "2"], ["1", "cat", "2"]),
        (["True", "False", "True"], ["True", "False", "True"]),
    ],
)  # fmt: skip
def test_what_cells_mean(cells: list[str], expected: list[str | None], tmp_path: Path) -> None:
    names = ["0001.png", "0002.png", "0003.png"]
    put(tmp_path, *names)
    write_csv(
        tmp_path / "metadata.csv", ["file_name", "label"], [list(r) for r in zip(names, cells, strict=True)]
    )
    assert labels(tmp_path) == dict(zip(names, expected, strict=True))


def test_an_index_that_pandas_wrote_names_no_files(tmp_path: Path) -> None:
    put(tmp_path, "0.png", "1.png")
    rows = [[0, "0.png", "cat", ""], [1, "1.png", "dog", ""]]
    write_csv(tmp_path / "metadata.csv", ["", "file_name", "label", ""], rows)
    found, items = opened(tmp_path)
    assert {item.path: item.label for item in items} == {"0.png": "cat", "1.png": "dog"}
    assert not found.listing.ignored and not found.listing.bad


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_labels_that_are_not_unicode_are_escaped(kind: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("0.png", "1.png"):
        put(data, name)
    label = "caf\udce9" if kind == "csv" else "\ud83d"  # Latin-1 in the file; half of an emoji
    shown = "caf\\xe9" if kind == "csv" else "\\ud83d"
    TABLES[kind](data / f"metadata.{kind}", ["file_name", "label"], [["0.png", label], ["1.png", "tea"]])
    assert labels(data) == {"0.png": shown, "1.png": "tea"}
    output = str(tmp_path / "out")
    manifest = prepare(PrepareConfig(output, input=str(data), image_size=8))
    assert manifest.image["classes"] == [shown, "tea"]
    assert open_splits(str(data), 8)["train"].image.classes == (shown, "tea")


def test_a_number_of_thousands_of_digits_is_no_class(tmp_path: Path) -> None:
    put(tmp_path, "0.png", "1.png")
    write_csv(tmp_path / "metadata.csv", ["file_name", "label"], [["0.png", "9" * 5000], ["1.png", 1]])
    found, items = opened(tmp_path)
    assert [item.label for item in items] == ["1"] and "not a class number" in found.listing.bad["0.png"]


def test_labels_that_can_be_no_classes_are_bad_one_by_one(tmp_path: Path) -> None:
    put(tmp_path, *(f"{i}.png" for i in range(6)))
    values = [2, 0.5, [1, 2], [1], "3", -7]
    write_jsonl(
        tmp_path / "metadata.jsonl", ["file_name", "label"], [[f"{i}.png", v] for i, v in enumerate(values)]
    )
    found, items = opened(tmp_path)
    assert {i.path: i.label for i in items} == {"0.png": "2", "3.png": "1", "4.png": "3"}
    assert found.listing.bad.keys() == {"1.png", "2.png", "5.png"}
    assert (
        "names 2 classes" in found.listing.bad["2.png"] and "not a class number" in found.listing.bad["1.png"]
    )


def test_an_image_named_twice_needs_one_label(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png", "c.png")
    rows = [["a.png", 0], ["a.png", 0], ["b.png", 0], ["b.png", 1], ["./c.png", 1], ["c.png", 1]]
    write_csv(tmp_path / "metadata.csv", ["file_name", "label"], rows)
    found, items = opened(tmp_path)
    assert {i.path: i.label for i in items} == {"a.png": "0", "c.png": "1"}
    assert found.listing.bad == {"b.png": "listed twice in metadata.csv, with different labels"}


@pytest.mark.parametrize("written", ["utf-8", "utf-8-sig"])
def test_names_in_metadata_are_found_however_they_are_written(written: str, tmp_path: Path) -> None:
    latin, accent = os.fsdecode(b"caf\xe9.png"), "\u00e9t\u00e9.png"
    put(tmp_path, latin, unicodedata.normalize("NFD", accent), "sub/x.png", "#[*%41 .png")
    rows = [[latin, "l"], [accent, "a"], ["sub\\x.png", "s"], ["./#[*%41 .png", "o"]]
    write_csv(tmp_path / "metadata.csv", ["file_name", "label"], rows, encoding=written)
    assert sorted(filter(None, labels(tmp_path).values())) == ["a", "l", "o", "s"]
    assert not opened(tmp_path)[0].listing.bad


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "label": 1}\n{"file_na', "line 2 is not a JSON object"),
        ("metadata.jsonl", b'["a.png", 1]\n', "line 1 is not a JSON object"),
        ("metadata.csv", b"file_name,label\na.png,1,2,3\n", "can't be read"),
        ("metadata.parquet", b"PAR1 cut", "can't be read"),
        ("metadata.jsonl", b'{"file_name": 7, "label": 1}\n', "values that are not file names"),
        ("dataset.json", b'{"labels": [["a.png", 1], ["b.p', "damaged"),
        ("dataset.json", b'{"labels": [["a.png", 1], "b.png"]}', "not all pairs"),
        ("dataset.json", b'{"labels": [["a.png", [0.25, 0.5]]]}', "vectors, not classes"),
    ],
)  # fmt: skip
def test_damaged_files_of_labels_are_refused_in_one_line(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    put(put(tmp_path, "a.png"), name, data=content)
    with pytest.raises(InputError, match=words) as error:
        opened(tmp_path, source="folder")
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet", "dataset.json"])
def test_files_of_labels_that_are_there_and_lead_nowhere_are_refused(name: str, tmp_path: Path) -> None:
    (put(tmp_path, "cat/a.png") / name).symlink_to("nothing")
    with pytest.raises(InputError, match="a link to nothing: this file may hold labels"):
        opened(tmp_path)


def test_two_files_of_labels_for_one_folder_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    write_csv(tmp_path / "metadata.csv", ["file_name", "label"], [["a.png", 1]])
    write_jsonl(tmp_path / "metadata.jsonl", ["file_name", "text"], [["a.png", "words"]])
    assert labels(tmp_path) == {"a.png": "1"}
    write_jsonl(tmp_path / "metadata.jsonl", ["file_name", "label"], [["a.png", 2]])
    with pytest.raises(InputError, match=r"metadata\.csv and metadata\.jsonl"):
        opened(tmp_path)


# EDM's dataset.json, and this project's own files.


def test_edms_folders_are_no_classes(tmp_path: Path) -> None:
    names = [f"{i // 3:05d}/img{i:08d}.png" for i in range(7)]
    put(tmp_path, *names)
    (tmp_path / "dataset.json").write_text(
        json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names[:6])]})
    )
    found, items = opened(tmp_path)
    assert {i.path: i.label for i in items} == {name: str(i % 3) for i, name in enumerate(names[:6])}
    assert found.listing.classes == ("0", "1", "2")
    assert found.listing.ignored == {names[6]: "not listed in dataset.json"}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": None}))
    assert labels(tmp_path) == dict.fromkeys(names) and opened(tmp_path)[0].listing.classes == ()
    one_hot = {"labels": {name: [0, int(i % 2 == 0), int(i % 2 == 1)] for i, name in enumerate(names)}}
    (tmp_path / "dataset.json").write_text(json.dumps(one_hot))
    assert labels(tmp_path) == {name: str(1 + i % 2) for i, name in enumerate(names)}


@pytest.mark.parametrize(
    "content", ['{"name": "pets"}', '{"labels": ["cat", "dog"]}', "[1, 2]", "not json", ""]
)
def test_another_dataset_json_is_a_side_file(content: str, tmp_path: Path) -> None:
    (put(tmp_path, "cat/1.png", "dog/2.png") / "dataset.json").write_text(content)
    assert labels(tmp_path) == {"cat/1.png": "cat", "dog/2.png": "dog"}
    assert opened(tmp_path)[0].listing.ignored == {"dataset.json": "not an image"}


@pytest.mark.parametrize("classes", [("zebra", "ant"), ()])
@pytest.mark.parametrize("labelled", [True, False])
def test_generated_images_keep_their_labels(classes: tuple[str, ...], labelled: bool, tmp_path: Path) -> None:
    from pipeline.generation.writers import png_metadata, png_place

    numbers = [i % 2 if labelled and classes else None for i in range(6)]
    table = png_metadata(list(range(6)), numbers, 0, classes)
    names = [png_place(i, number, list(classes)) for i, number in enumerate(numbers)]
    put(tmp_path, *names)
    pq.write_table(table, tmp_path / IMAGE_FOLDER_TABLE)
    found, items = opened(tmp_path)
    wanted = [classes[number] if number is not None else None for number in numbers]
    assert {i.path: i.label for i in items} == dict(zip(names, wanted, strict=True))
    assert found.listing.classes == classes and not found.listing.ignored
