"""One place decides what a label is: prepare and training on raw files agree, for every source and type."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.images import encode_png
from pipeline.data.index import open_splits, read_rows
from pipeline.data.labels import MOST_UNNAMED_CLASSES, ClassNumbers, LabelError, label_text, name_classes
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.errors import InputError

ROWS = 40
TEXT = ["cat" if i % 2 else "dog" for i in range(ROWS)]
COLUMNS = {
    "string": pa.array(TEXT),
    "large_string": pa.array(TEXT, pa.large_string()),
    "string_view": pa.array(TEXT, pa.string_view()),
    "dictionary": pa.array(TEXT).dictionary_encode(),
    "bool": pa.array([i % 2 == 1 for i in range(ROWS)]),
    "uint8": pa.array([i % 2 for i in range(ROWS)], pa.uint8()),
    "float": pa.array([float(i % 2) for i in range(ROWS)]),
    "missing": pa.array([i % 2 if i % 4 else None for i in range(ROWS)]),
    "minus one": pa.array([i % 2 if i % 4 else -1 for i in range(ROWS)]),
    "out of range": pa.array([i % 2 if i % 4 else 7 for i in range(ROWS)]),
}
NAMES = {"out of range": ["even", "odd"]}


def picture(number: int) -> bytes:
    """Number `number` in its first pixel."""
    pixels = np.full((8, 8, 1), 200, np.uint8)
    pixels[0, 0] = number
    return encode_png(pixels)


def labels_of(uri: str) -> tuple[dict[int, int], tuple[str, ...], int]:
    """The class number of each image by the number in it, the classes, and how many images are left out."""
    from pipeline.data.images import decode

    found, splits = dict[int, int](), open_splits(uri)
    for index in splits.indexes.values():
        for group in index.groups:
            table = read_rows(group, np.arange(group.rows))
            for data, label in zip(table["bytes"].to_pylist(), table["label"].to_pylist(), strict=True):
                found[int(decode(data, 8, 1)[0, 0, 0])] = label
    return found, index.image.classes, index.quarantined


@pytest.mark.parametrize("kind", COLUMNS)
def test_prepare_and_training_on_the_raw_file_agree(kind: str, tmp_path: Path, cluster: None) -> None:
    images = pa.array([{"bytes": picture(i), "path": f"{i}.png"} for i in range(ROWS)])
    table = pa.table({"image": images, "label": COLUMNS[kind]})
    if kind in NAMES:
        feature = {"label": {"names": NAMES[kind], "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    (tmp_path / "raw").mkdir()
    pq.write_table(table, tmp_path / "raw" / "train.parquet")
    config = PrepareConfig(
        output=str(tmp_path / "prepared"), source="huggingface", input=str(tmp_path / "raw"), image_size=8,
        max_bad_fraction=0.5,
    )  # fmt: skip
    prepare(config)
    raw, prepared = labels_of(config.input), labels_of(config.output)
    assert raw == prepared
    found, classes, left_out = raw
    if kind == "out of range":
        assert (len(found), classes, left_out) == (30, ("even", "odd"), 10)
    else:
        assert (len(found), len(classes), left_out) == (ROWS, 2, 0)
    without = {number for number, label in found.items() if label == -1}
    assert without == (set(range(0, ROWS, 4)) if kind in ("missing", "minus one") else set())
    assert len({label for number, label in found.items() if number % 2}) == 1


def test_a_web_datasets_labels_are_read_in_the_same_way(tmp_path: Path, cluster: None) -> None:
    cases: list[tuple[str, bytes, int]] = [
        ("cls", b" 1\n", 1), ("cls", b"-1", -1), ("cls", b"", -1), ("json", b'{"label": 0}', 0),
        ("json", b'{"label": true}', 1), ("json", b'{"label": 1.0}', 1), ("json", b'{"label": null}', -1),
        ("json", b"[1]", -1), ("json", b"{", -1),
    ]  # fmt: skip
    mistakes = [("json", b'{"label": [1]}'), ("cls", b"cat")]
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw" / "a.tar", "w") as tar:
        for number, (suffix, content) in enumerate([(s, c) for s, c, _ in cases] + mistakes):
            for name, data in ((f"{number:03d}.png", picture(number)), (f"{number:03d}.{suffix}", content)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    config = PrepareConfig(
        output=str(tmp_path / "prepared"),
        source="webdataset",
        input=str(tmp_path / "raw"),
        image_size=8,
        max_bad_fraction=0.5,
    )
    prepare(config)
    raw, prepared = labels_of(config.input), labels_of(config.output)
    assert raw == prepared
    assert raw == ({number: label for number, (_, _, label) in enumerate(cases)}, ("0", "1"), len(mistakes))


def test_what_values_mean() -> None:
    assert [label_text(value) for value in (None, float("nan"), "", b" 3 ")] == [None] * 3 + ["3"]
    assert [label_text(value) for value in (True, 2, 2.0, 2.5, " a ", -1.0)] == [
        "1",
        "2",
        "2",
        "2.5",
        " a ",
        "-1",
    ]
    assert [label_text(value, ("a", "b")) for value in (0, 1, 2)] == ["a", "b", "2"]


def test_classes_are_named_by_the_numbers_up_to_the_largest_or_by_the_texts() -> None:
    assert name_classes({"10", "2", "-1"}) == tuple(map(str, range(11)))
    assert name_classes({"b", "a", "2"}) == ("2", "a", "b")
    assert name_classes({str(10**12)}) == name_classes(set()) == ()
    with pytest.raises(InputError, match="those are no classes"):
        name_classes({f"x{i}" for i in range(MOST_UNNAMED_CLASSES + 1)})


def test_an_images_class() -> None:
    number_of = ClassNumbers(("a", "b"))
    assert [number_of(label) for label in ("b", None, "-1")] == [1, -1, -1]
    assert ClassNumbers(())("7") == ClassNumbers(tuple(map(str, range(10))))("007") == 7
    for label, classes in (("c", ("a", "b")), ("x", ())):
        with pytest.raises(LabelError, match=f"label '{label}' is not"):
            ClassNumbers(classes)(label)
