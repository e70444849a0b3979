"""Choice of the image column in Parquet and Arrow files."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import InputError
from tests.data.tables import (
    COUNT,
    IMAGE,
    IMAGES,
    NUMBERS,
    STRUCT,
    WORDS,
    binary,
    both,
    features,
    items,
    listed,
    listing,
    structs,
    write,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "column", "metadata"),
    [
        ("img", structs(), features(img=IMAGE)),
        ("anything", structs(), features(anything=IMAGE)),
        ("photo of it", structs(), None),
        ("x", structs(pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])), None),
        ("x", structs(pa.struct([("path", pa.string_view()), ("bytes", pa.binary_view())])), None),
        ("x", structs(pa.struct([("bytes", pa.binary())])), None),
        ("picture", binary(), None),
        ("a.b", binary(pa.large_binary()), None),
        ("x", binary(pa.binary_view()), None),
        ("x", binary().dictionary_encode(), None),
        ("x", binary(), features(x={"_type": "Value", "dtype": "binary"})),
        ("images", listed(pa.list_), features(images={"_type": "List", "feature": IMAGE})),
        ("images", listed(pa.large_list), features(images=[IMAGE])),
        ("x", listed(lambda inner: pa.list_(inner, 1)), None),
        ("x", listed(pa.list_, pa.binary()), None),
        ("x", listed(pa.list_view, pa.large_binary()), None),
        ("image", structs(), {b"huggingface": b"{}"}),
        ("image", structs(), {b"huggingface": b"not json"}),
        ("image", structs(), features(other=IMAGE)),
    ],
)
def test_images_are_found_by_their_type(
    tmp_path: Path, name: str, column: pa.Array, metadata: dict[bytes, bytes] | None
) -> None:
    other = {"id": list(range(COUNT)), "caption": WORDS, "raw": [b"no image"] * COUNT}
    for found in both(tmp_path, {**other, name: column, "label": NUMBERS}, metadata):
        assert [item.data for item in items(found)] == IMAGES
        assert [item.label for item in items(found)] == list(map(str, NUMBERS))
        assert not any(item.reason for item in items(found))
        assert len({item.path for item in items(found)}) == COUNT
        assert not found.ignored and not found.bad


def test_images_of_one_length_are_found_in_a_column_of_fixed_size(tmp_path: Path) -> None:
    size = max(map(len, IMAGES))
    padded = [data.ljust(size, b"\0") for data in IMAGES]
    columns = {"digest": pa.array([b"d" * 32] * COUNT, pa.binary(32)), "x": pa.array(padded, pa.binary(size))}
    for found in both(tmp_path, columns):
        assert [item.data for item in items(found)] == padded


SOUND = pa.array([{"bytes": b"RIFF\x24\0\0\0WAVEfmt ", "path": "a.wav"}] * COUNT, STRUCT)


@pytest.mark.parametrize(
    ("columns", "metadata", "image"),
    [
        ({"mask": structs(images=IMAGES[::-1]), "image": structs()}, None, "image"),
        ({"thumbnail": binary(), "img": binary()}, None, "img"),
        ({"Photo": binary(), "before": binary()}, None, "Photo"),
        ({"image": structs(images=IMAGES[::-1]), "scan": structs()}, features(scan=IMAGE), "scan"),
        ({"sound": SOUND, "scan": structs()}, None, "scan"),
        ({"image": SOUND, "scan": structs()}, features(image={"_type": "Audio"}, scan=IMAGE), "scan"),
        ({"audio": SOUND, "x": binary()}, features(audio={"_type": "Audio"}), "x"),
        ({"sound": SOUND, "x": binary()}, None, "x"),
    ],
)
def test_the_surest_type_and_then_the_most_usual_name_decides(
    tmp_path: Path, columns: dict[str, Any], metadata: dict[bytes, bytes] | None, image: str
) -> None:
    write(tmp_path / "a.parquet", columns, metadata)
    assert listing(tmp_path).parts[0].columns.image == image  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("names", "metadata"),
    [
        (("before", "after"), None),
        (("x_0", "x_1"), features(x_0=IMAGE, x_1=IMAGE)),
        (("left", "right"), features(left={"_type": "Value"}, right={"_type": "Value"})),
    ],
)
def test_where_several_columns_may_be_meant_one_is_asked_for(
    tmp_path: Path, names: tuple[str, str], metadata: dict[bytes, bytes] | None
) -> None:
    write(tmp_path / "a.parquet", {names[0]: structs(), names[1]: structs(images=IMAGES[::-1])}, metadata)
    with pytest.raises(
        InputError, match=f"^columns {names[0]} and {names[1]} hold images: give --image-column$"
    ):
        listing(tmp_path)
    assert [item.data for item in items(listing(tmp_path, image_column=names[1]))] == IMAGES[::-1]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            {"image_column": "img"},
            "--image-column img: there is no such column; a.parquet has image, n, label, box",
        ),
        ({"image_column": "n"}, "--image-column n: holds int64 in a.parquet, not images"),
        ({"image_column": "box"}, "--image-column box: holds struct<x: int64> in a.parquet, not images"),
        (
            {"label_column": "class"},
            "--label-column class: there is no such column; a.parquet has image, n, label, box",
        ),
        ({"label_column": "box"}, "--label-column box: holds struct<x: int64> in a.parquet, not labels"),
        ({"label_column": "image"}, "--label-column image: holds struct<.*> in a.parquet, not labels"),
    ],
)
def test_a_column_that_is_not_there_or_holds_something_else_is_refused(
    tmp_path: Path, flag: dict[str, Any], message: str
) -> None:
    content = {"image": structs(), "n": list(range(COUNT)), "label": NUMBERS, "box": [{"x": 1}] * COUNT}
    write(tmp_path / "a.parquet", content)
    with pytest.raises(InputError, match=f"^{message}$"):
        listing(tmp_path, **flag)
