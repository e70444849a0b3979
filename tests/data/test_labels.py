"""One place decides what a label means: prepared shards and raw files give the same classes and numbers."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import Source
from pipeline.data.groups import read_rows
from pipeline.data.images import decode
from pipeline.data.index import open_splits
from pipeline.data.labels import (
    MOST_UNNAMED_CLASSES,
    class_numbers,
    label_text,
    name_classes,
    stored_numbers,
)
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.errors import InputError
from tests.data.common import encoded, plain_parquet

IMAGES = encoded(48)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("cat", "cat"), (b" owl\n", "owl"), (b"", None), (None, None), (float("nan"), None), (7, "7"), (-1, "-1"),
        (1, "b"), (True, "b"), (0.0, "0"), (2, "2"), (2.5, "2.5"),
    ],
)  # fmt: skip
def test_what_stands_beside_an_image_becomes_text(value: Any, text: str | None) -> None:
    names = ("a", "b") if value in (1, True) and text == "b" else ()
    assert label_text(value, names) == text


def test_classes_that_nothing_names() -> None:
    assert name_classes([]) == name_classes(["-1"]) == ()
    assert name_classes({"0", "2"}) == name_classes(["-1", "2", "002"]) == ("0", "1", "2")
    assert name_classes(["b", "a", "10", "9"]) == ("10", "9", "a", "b")
    assert name_classes([str(MOST_UNNAMED_CLASSES)]) == ()
    assert name_classes(["9" * 5000, "1"]) == ("1", "9" * 5000)
    with pytest.raises(InputError, match="too many for classes"):
        name_classes(f"caption {i}" for i in range(MOST_UNNAMED_CLASSES + 1))


def test_numbers_of_classes() -> None:
    named, counted, unnamed = (
        class_numbers(("dog", "-1", "7")),
        class_numbers(("0", "1", "2")),
        class_numbers(()),
    )
    assert [named(label) for label in ("dog", "-1", "7", None)] == [0, 1, 2, -1]
    assert [counted(label) for label in ("2", "01", "-1", None)] == [2, 1, -1, -1]
    assert [unnamed(label) for label in ("5", "-1", None)] == [5, -1, -1]
    for numbers, label in (
        (named, "0"),
        (counted, "3"),
        (counted, "cat"),
        (unnamed, "cat"),
        (unnamed, "1" * 19),
    ):
        assert numbers(label) is None


def test_numbers_that_stand_in_a_file() -> None:
    for column, numbers in (
        (pa.array([3, None, 0], pa.uint8()), [3, -1, 0]),
        (pa.array(["1", "2"]), [-1, -1]),
    ):
        assert stored_numbers(pa.chunked_array([column])).to_pylist() == numbers


def texts(count: int) -> list[str]:
    return ["cat" if i % 2 else "dog" for i in range(count)]


def of_every_kind(folder: Path) -> None:
    """Write the same text labels in each of Arrow's text types."""
    kinds: list[Callable[[pa.Array], pa.Array]] = [
        lambda column: column,
        lambda column: column.cast(pa.large_string()),
        lambda column: column.cast(pa.string_view()),
        lambda column: column.dictionary_encode(),
    ]
    for number, kind in enumerate(kinds):
        some = IMAGES[number * 12 : number * 12 + 12]
        plain_parquet(folder / f"{number}.parquet", some, kind(pa.array(texts(12))))


def column(values: Iterable[object]) -> Callable[[Path], None]:
    return lambda folder: plain_parquet(folder / "a.parquet", IMAGES, pa.array(values))


def tar(labels: Iterable[object]) -> Callable[[Path], None]:
    """Return a writer of a tar. Text labels are stored in .cls members, others in .json members."""

    def write(folder: Path) -> None:
        with tarfile.open(folder / "a.tar", "w") as file:
            for i, (image, label) in enumerate(zip(IMAGES, labels, strict=True)):
                beside = ("cls", label) if isinstance(label, str) else ("json", json.dumps({"label": label}))
                for suffix, data in (("png", image), (beside[0], beside[1].encode())):
                    member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))

    return write


def rows(uri: Path) -> dict[bytes, int]:
    """Return the label of every image by the image's pixels."""
    groups = [group for split in open_splits(str(uri)).indexes.values() for group in split.groups]
    tables = [read_rows(group, np.arange(group.rows)).to_pylist() for group in groups]
    return {decode(row["bytes"], 12, 3).tobytes(): row["label"] for table in tables for row in table}


@pytest.mark.usefixtures("prepared_here")
@pytest.mark.parametrize(
    ("source", "write", "classes", "numbers"),
    [
        ("huggingface", of_every_kind, ["cat", "dog"], [1, 0] * 24),
        ("huggingface", column([i % 2 == 1 for i in range(48)]), ["0", "1"], [0, 1] * 24),
        ("huggingface", column([float(i % 2) for i in range(48)]), ["0", "1"], [0, 1] * 24),
        ("huggingface", column([-1, 0, 2, None] * 12), ["0", "1", "2"], [-1, 0, 2, -1] * 12),
        ("webdataset", tar(["007", "-1", "1"] * 16), [str(i) for i in range(8)], [7, -1, 1] * 16),
        ("webdataset", tar([None, "owl", 3] * 16), ["3", "owl"], [-1, 1, 0] * 16),
    ],
    ids=["texts", "booleans", "floats", "unpublished", "zeros in front", "text or json"],
)
def test_prepared_and_raw_agree(
    tmp_path: Path,
    source: Source,
    write: Callable[[Path], None],
    classes: list[str],
    numbers: list[int],
) -> None:
    raw, prepared = tmp_path / "raw", tmp_path / "prepared"
    raw.mkdir()
    write(raw)
    expected = {decode(data, 12, 3).tobytes(): number for data, number in zip(IMAGES, numbers, strict=True)}
    assert rows(raw) == expected
    assert open_splits(str(raw))["train"].image.classes == tuple(classes)
    manifest = prepare(PrepareConfig(str(prepared), source, str(raw), image_size=12))
    assert (manifest.image["classes"], manifest.quarantined) == (classes, 0)
    assert rows(prepared) == expected


@pytest.mark.usefixtures("prepared_here")
@pytest.mark.parametrize(
    ("source", "write"),
    [("huggingface", column([0, 1, -7, 1] * 12)), ("webdataset", tar([0, "cat", 1, [1]] * 12))],
)
def test_labels_of_no_class_are_left_out_of_both(
    tmp_path: Path, source: Source, write: Callable[[Path], None]
) -> None:
    """If the first label is a number, only numbers are classes."""
    raw, prepared = tmp_path / "raw", tmp_path / "prepared"
    raw.mkdir()
    write(raw)
    manifest = prepare(PrepareConfig(str(prepared), source, str(raw), image_size=12, max_bad_fraction=0.5))
    index = open_splits(str(raw))["train"]
    assert manifest.image["classes"] == list(index.image.classes) == ["0", "1"]
    assert manifest.quarantined == index.quarantined == 48 - len(rows(raw)) > 0
    assert rows(prepared) == rows(raw)
