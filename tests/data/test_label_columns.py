"""Choice and meaning of the label column in Parquet and Arrow files."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.labels import class_numbers, class_text
from pipeline.errors import InputError
from tests.data.tables import (
    COUNT,
    IMAGE,
    NUMBERS,
    WORDS,
    binary,
    both,
    class_label,
    features,
    items,
    listing,
    structs,
    write,
)  # fmt: skip

XY = class_label("x", "y")


@pytest.mark.parametrize(
    ("columns", "metadata", "label", "names"),
    [
        ({"label": NUMBERS}, features(label=XY), "label", ("x", "y")),
        ({"breed": NUMBERS, "label": WORDS}, features(breed=XY), "breed", ("x", "y")),
        ({"fine": NUMBERS, "label": NUMBERS}, features(fine=XY, label=class_label("a", "b")), "label", ("a", "b")),
        ({"cls": NUMBERS}, features(cls={"_type": "ClassLabel", "names": {"1": "b", "0": "a"}}), "cls", ("a", "b")),
        ({"n": [7] * COUNT, "Target": NUMBERS}, None, "Target", ()),
        ({"category": WORDS, "labels": NUMBERS}, None, "labels", ()),
        ({"y": NUMBERS, "class": WORDS}, None, "class", ("cat", "dog")),
        ({"label": structs(), "class": WORDS}, features(image=IMAGE, label=IMAGE), "class", ("cat", "dog")),
        ({"label": binary(), "class": WORDS}, features(image=IMAGE), "class", ("cat", "dog")),
        ({"labels": [[i] for i in NUMBERS]}, features(labels={"_type": "List", "feature": XY}), "labels", ("x", "y")),
        ({"caption": WORDS, "n": NUMBERS}, None, "", ()),
        ({"label": [{"x": 1}] * COUNT}, None, "", ()),
    ],
)  # fmt: skip
def test_labels_are_found(
    tmp_path: Path,
    columns: dict[str, Any],
    metadata: dict[bytes, bytes] | None,
    label: str,
    names: tuple[str, ...],
) -> None:
    for found in both(tmp_path, {"image": structs(), **columns}, metadata):
        assert {part.columns.label for part in found.parts} == {label}  # type: ignore[attr-defined]
        assert found.classes == names
        read = [item.label for item in items(found)]
        words = {0: names[0], 1: names[1]} if names else {0: "0", 1: "1"}
        by_text = label and columns[label] == WORDS
        assert read == ([None] * COUNT if not label else WORDS if by_text else [words[i] for i in NUMBERS])


@pytest.mark.parametrize(
    "names", [("fine_label", "coarse_label"), ("age", "gender"), ("class", "superclass")]
)
def test_where_several_columns_hold_classes_one_is_asked_for(tmp_path: Path, names: tuple[str, str]) -> None:
    metadata = features(**{names[0]: class_label("a", "b"), names[1]: class_label("c", "d")})
    write(tmp_path / "a.parquet", {"image": structs(), names[0]: NUMBERS, names[1]: NUMBERS}, metadata)
    with pytest.raises(
        InputError, match=f"^columns {names[0]} and {names[1]} hold classes: give --label-column"
    ):
        listing(tmp_path)
    assert listing(tmp_path, label_column=names[1]).classes == ("c", "d")
    without = listing(tmp_path, label_column="none")
    assert without.classes == () and {item.label for item in items(without)} == {None}


@pytest.mark.parametrize(
    ("column", "classes", "labels"),
    [
        (pa.array(WORDS), ("cat", "dog"), WORDS),
        (pa.array(WORDS, pa.large_string()), ("cat", "dog"), WORDS),
        (pa.array(WORDS, pa.string_view()), ("cat", "dog"), WORDS),
        (pa.array(WORDS).dictionary_encode(), ("cat", "dog"), WORDS),
        (pa.array(WORDS, pa.large_string()).dictionary_encode(), ("cat", "dog"), WORDS),
        (pa.array([word.encode() for word in WORDS]), ("cat", "dog"), WORDS),
        (pa.array([[word] for word in WORDS]), ("cat", "dog"), WORDS),
        (pa.array([f" {word}\n" for word in WORDS]), ("cat", "dog"), WORDS),
        (pa.array([i == 1 for i in NUMBERS]), (), list(map(str, NUMBERS))),
        (pa.array(NUMBERS, pa.int8()), (), list(map(str, NUMBERS))),
        (pa.array(NUMBERS, pa.uint8()), (), list(map(str, NUMBERS))),
        (pa.array(NUMBERS, pa.uint64()), (), list(map(str, NUMBERS))),
        (pa.array(NUMBERS, pa.float64()), (), list(map(str, NUMBERS))),
        (pa.array(np.array(NUMBERS, np.float16)), (), list(map(str, NUMBERS))),
        (pa.array(NUMBERS, pa.int64()).dictionary_encode(), (), list(map(str, NUMBERS))),
        (pa.array([Decimal(i) for i in NUMBERS], pa.decimal128(9, 2)), (), list(map(str, NUMBERS))),
        (pa.array([[i] for i in NUMBERS], pa.list_(pa.int32(), 1)), (), list(map(str, NUMBERS))),
        (pa.array(list(map(str, NUMBERS))), ("0", "1"), list(map(str, NUMBERS))),
        (pa.nulls(COUNT), (), [None] * COUNT),
        (pa.array([None, "", "  ", "a"] * 4), ("a",), [None, None, None, "a"] * 4),
        (pa.array(["-1", "b", None, "a"] * 4), ("a", "b"), ["-1", "b", None, "a"] * 4),
        (pa.array([-1, 1, None, 0] * 4), (), [None, "1", None, "0"] * 4),
        (pa.array([-1.0, 1, float("nan"), None] * 4), (), [None, "1", None, None] * 4),
        (pa.array([[], [1], None, [-1]] * 4), (), [None, "1", None, None] * 4),
    ],
)  # fmt: skip
def test_labels_mean_the_same_in_every_type(
    tmp_path: Path, column: pa.Array, classes: tuple[str, ...], labels: list[str | None]
) -> None:
    for found in both(tmp_path, {"image": structs(), "label": column}):
        assert (found.classes, [item.label for item in items(found)]) == (classes, labels)
        assert not any(item.reason for item in items(found))
        assert None not in map(class_numbers(classes), labels)


@pytest.mark.parametrize(
    ("column", "metadata", "reason"),
    [
        (pa.array([1, 0, 1, -7] * 4), None, "label -7 is not a class number"),
        (pa.array([1, 0, 1, 0.5] * 4), None, "label 0.5 is not a class number"),
        (pa.array([1, 0, 1, float("inf")] * 4), None, "label inf is not a class number"),
        (
            pa.array([Decimal("1.0"), Decimal(0), None, Decimal("1.5")] * 4),
            None,
            "label 1.5 is not a class number",
        ),
        (pa.array([1, 0, 1, 10**18] * 4), None, "label 1000000000000000000 is not a class number"),
        (pa.array([[1], [0], [], [0, 1]] * 4), None, "label \\[0, 1\\] names 2 classes"),
        (pa.array([["a"], ["b"], None, ["a", "b"]] * 4), None, "label \\['a', 'b'\\] names 2 classes"),
        (
            pa.array([1, 0, -1, 2] * 4),
            features(label=class_label("7", "2")),
            "label 2 is not among the 2 classes",
        ),
    ],
)
def test_what_is_no_class_is_named(
    tmp_path: Path, column: pa.Array, metadata: dict[bytes, bytes] | None, reason: str
) -> None:
    for found in both(tmp_path, {"image": structs(), "label": column}, metadata):
        reasons = [item.reason for item in items(found)]
        assert reasons[3::4] == [reason.replace("\\", "")] * 4
        assert not any(reasons[0::4] + reasons[1::4] + reasons[2::4])
        assert all(item.data == b"" for item in items(found) if item.reason)


@pytest.mark.parametrize(
    ("value", "names", "label"),
    [
        (0, ("a", "b"), "a"),
        (True, ("a", "b"), "b"),
        (-1, ("a", "-1"), None),
        ("1", ("a", "b"), "1"),
        (np.int8(1), (), "1"),
    ],
)
def test_names_stand_for_numbers_alone(value: Any, names: tuple[str, ...], label: str | None) -> None:
    assert class_text(value, names) == (label, "")
