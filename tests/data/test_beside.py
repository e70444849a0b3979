"""Parquet and Arrow files whose rows hold paths of image files beside them."""

import errno
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.data.sources.arrow import is_arrow, list_arrow
from pipeline.data.sources.cells import ELSEWHERE, name_beside
from pipeline.data.sources.parquet import is_parquet, list_parquet
from pipeline.data.sources.parts import Item, Request, SourceListing
from pipeline.data.sources.tree import open_tree
from pipeline.storage import StorageError
from tests.data.tables import (
    COUNT,
    IMAGE,
    IMAGES,
    NUMBERS,
    STRUCT,
    WORDS,
    features,
    items,
    listing,
    write,
)
from tests.data.weather import Weather

NAMES = [f"images/{word}/{i:02d}.img" for i, word in enumerate(WORDS)]


def images(root: Path) -> Path:
    for name, data in zip(NAMES, IMAGES, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def cells(names: list[str], inner: pa.DataType) -> pa.Array:
    return pa.array(
        [{"bytes": None, "path": name} for name in names],
        pa.struct([("bytes", inner), ("path", pa.string())]),
    )


@pytest.mark.parametrize(
    ("name", "column", "metadata"),
    [
        ("file_name", pa.array(NAMES), None),
        ("whatever", pa.array(NAMES, pa.large_string()), None),
        ("x", pa.array(NAMES).dictionary_encode(), None),
        ("files", pa.array([[name] for name in NAMES]), None),
        ("image", pa.array([f"./images/../{name}" for name in NAMES]), None),
        ("image", cells(NAMES, pa.null()), None),
        ("image", cells(NAMES, pa.binary()), None),
        ("pic", cells(NAMES, pa.binary()), features(pic=IMAGE)),
        ("pic", pa.array(NAMES), features(pic=IMAGE)),
        (
            "image",
            pa.array([[cell] for cell in cells(NAMES, pa.binary()).to_pylist()], pa.list_(STRUCT)),
            None,
        ),
    ],
)
def test_images_lie_beside(
    tmp_path: Path, name: str, column: pa.Array, metadata: dict[bytes, bytes] | None
) -> None:
    columns = {"id": NUMBERS, name: column, "label": WORDS}
    root = images(tmp_path / "data")
    write(root / "train.parquet", columns, metadata, row_group_size=4)
    (root / "notes.txt").write_text("notes")
    (root / "images" / "unnamed.img").write_bytes(IMAGES[0])
    found = listing(root, 4)
    assert [(item.data, item.label) for item in items(found)] == list(zip(IMAGES, WORDS, strict=True))
    assert found.used == {"train.parquet", *NAMES}
    # Each part depends on its own images, so a changed image causes only its part to be prepared again.
    assert [part.names for part in found.parts] == [
        ("train.parquet", *sorted(NAMES[i : i + 4])) for i in range(0, COUNT, 4)
    ]
    part = pickle.loads(pickle.dumps(found.parts[1]))
    assert part.table(np.array([2, 0]))["bytes"].to_pylist() == [IMAGES[6], IMAGES[4]]
    (root / "train.parquet").unlink()
    table = pa.table(columns).replace_schema_metadata(metadata)
    with pa.ipc.new_stream(root / "train.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    assert is_arrow(open_tree(str(root)))
    arrow = list_arrow(open_tree(str(root)), Request(4))
    assert [(item.data, item.label) for item in items(arrow)] == list(zip(IMAGES, WORDS, strict=True))
    assert arrow.used == {"train.arrow", *NAMES}
    assert [part.names[1:] for part in arrow.parts] == [part.names[1:] for part in found.parts]


def test_a_file_that_is_given_alone_finds_its_images(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp"):
        root = tmp_path / suffix
        root.mkdir()
        (root / f"1.{suffix}").write_bytes(IMAGES[0])
        write(root / "a.parquet", {"path": [f"1.{suffix}"], "label": [1]})
        assert [item.data for item in items(listing(root / "a.parquet"))] == [IMAGES[0]]


def test_a_storage_that_can_not_say_is_no_answer(bucket: str, weather: Weather, tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"path": ["1.png"], "label": [1]})
    filesystem, path = fsspec.core.url_to_fs(bucket)
    filesystem.put(str(tmp_path / "a.parquet"), f"{path}/a.parquet")
    filesystem.pipe(f"{path}/1.png", IMAGES[0])
    weather.storm("expired", 60.0, lambda method, path: "1.png" in path)
    with pytest.raises(StorageError, match="can't be read"):
        listing(f"{bucket}/a.parquet")
    weather.calm()
    assert [item.data for item in items(listing(f"{bucket}/a.parquet"))] == [IMAGES[0]]


@pytest.mark.parametrize("text", ["a\0b.png", "a cat " * 60 + ".png"])
def test_text_that_ends_like_a_file_leads_to_none(tmp_path: Path, text: str) -> None:
    write(tmp_path / "a.parquet", {"image": [IMAGES[0]], "text": [text]})
    assert [item.data for item in items(listing(tmp_path / "a.parquet"))] == [IMAGES[0]]


def test_some_rows_hold_bytes_and_others_paths(tmp_path: Path) -> None:
    root = images(tmp_path)
    rows = [{"bytes": None if i % 3 else data, "path": NAMES[i]} for i, data in enumerate(IMAGES)]
    write(root / "a.parquet", {"image": pa.array(rows, STRUCT)}, row_group_size=5)
    found = listing(root, 5)
    assert [item.data for item in items(found)] == IMAGES
    assert set(NAMES[1::3] + NAMES[2::3]) <= found.used
    assert found.parts[0].table(np.array([4, 0, 3]))["bytes"].to_pylist() == [IMAGES[4], IMAGES[0], IMAGES[3]]


def of_paths(root: Path, paths: list[str]) -> list[Item]:
    write(root / "sub" / "a.parquet", {"image": cells(paths, pa.binary())}, features(image=IMAGE))
    return items(listing(root))


def test_no_path_leads_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(IMAGES[0])
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "above.png").write_bytes(IMAGES[0])
    (tmp_path / "data" / "sub" / "in.png").write_bytes(IMAGES[1])
    outside = [
        str(tmp_path / "secret.png"), "../../secret.png", "../above.png", "x/../../above.png", "//secret.png", "~/a.png",
        "http://127.0.0.1:9/a.png", "s3://bucket/a.png", "file:///etc/hostname", "zip://a.png::in.zip", "C:\\a.png",
        "\\\\host\\a.png", "..", ".", "in.png\0", "hf://datasets/a/b.png",
    ]  # fmt: skip
    read = of_paths(tmp_path / "data", [*outside, "in.png", "x/../in.png"])
    assert [item.reason for item in read] == [ELSEWHERE] * len(outside) + [""] * 2
    assert [item.data for item in read] == [b""] * len(outside) + [IMAGES[1]] * 2
    assert not any(str(tmp_path) in item.path + item.reason for item in read)
    assert len({item.path for item in read}) == len(read)


@pytest.mark.parametrize(
    ("file", "path", "name"),
    [
        ("a.parquet", "x.png", "x.png"),
        ("sub/a.parquet", "x/y.png", "sub/x/y.png"),
        ("sub/a.parquet", "./x//y.png", "sub/x/y.png"),
        ("a.parquet", "..png", "..png"),
        ("a.parquet", "..x/y.png", "..x/y.png"),
        ("sub/a.parquet", "x\\y.png", "sub/x/y.png"),
        ("sub/a.parquet", "x\\..\\..\\y.png", None),
        ("a.parquet", "", None),
        ("sub/a.parquet", "..", None),
        ("sub/a.parquet", "x/../../y.png", None),
        ("a.parquet", "/x.png", None),
    ],
)
def test_names_of_files_beside(file: str, path: str, name: str | None) -> None:
    assert name_beside(file, path) == name


def test_an_image_that_is_not_there_is_named_alone(tmp_path: Path) -> None:
    (tmp_path / "sub" / "folder.png").mkdir(parents=True)
    (tmp_path / "sub" / "in.png").write_bytes(IMAGES[1])
    (tmp_path / "sub" / "nothing.png").symlink_to("nowhere.png")
    (tmp_path / "sub" / "circle.png").symlink_to("circle.png")
    names = [
        "in.png",
        "gone.png",
        "nothing.png",
        "in.png/x.png",
        "folder.png",
        "circle.png",
        f"{'x' * 300}.png",
    ]
    read = of_paths(tmp_path, names)
    words = ["it is not there"] * 3 + [
        "Is a directory",
        "Too many levels of symbolic links",
        "File name too long",
    ]
    assert [item.reason for item in read] == ["", *(
        f"its file sub/{name} can't be read: {word}" for name, word in zip(names[1:], words, strict=True)
    )]  # fmt: skip


@pytest.mark.parametrize(
    "error", [TimeoutError("slow"), OSError(errno.EIO, "I/O error"), ConnectionError("gone")]
)
def test_a_failing_storage_is_no_missing_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    root = images(tmp_path)
    write(root / "a.parquet", {"path": NAMES, "label": NUMBERS})
    part = listing(root).parts[0]

    def fail(uri: str) -> bytes:
        raise error

    monkeypatch.setattr(storage, "read_bytes", fail)
    with pytest.raises(type(error)):
        list(part.read())


@pytest.mark.parametrize(
    ("name", "columns", "source"),
    [
        ("train.parquet", {"path": NAMES}, True),  # the name gives a split
        ("a.parquet", {"path": NAMES, "class": WORDS}, True),  # the table has labels
        ("a.parquet", {"path": NAMES, "embedding": [[0.5]] * COUNT}, False),
        ("a.parquet", {"word": WORDS, "label": WORDS}, False),
        ("metadata.parquet", {"file_name": NAMES, "label": WORDS}, False),  # the metadata of an ImageFolder
        ("images/metadata.parquet", {"file_name": [n[7:] for n in NAMES], "label": WORDS}, False),
    ],
)
def test_paths_alone_make_no_source_of_a_folder_of_images(
    tmp_path: Path, name: str, columns: dict[str, Any], source: bool
) -> None:
    write(images(tmp_path) / name, columns)
    assert is_parquet(open_tree(str(tmp_path))) == source
    found: SourceListing = list_parquet(open_tree(str(tmp_path)), Request(5))
    assert len(items(found)) == (COUNT if "word" not in columns else 0)
