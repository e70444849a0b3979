"""Each row of a table is named with its file and folder, and a table without rows is reported."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.cluster.pool import in_process
from pipeline.config import Reading
from pipeline.data import shards
from pipeline.data.groups import read_rows
from pipeline.data.index import open_splits
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.data.sources.parquet import is_parquet
from pipeline.data.sources.parts import Request
from pipeline.data.sources.registry import open_source
from pipeline.data.sources.tree import open_tree
from pipeline.errors import InputError
from tests.data.common import encoded, tar_bytes
from tests.data.reading import listed, opened, put
from tests.data.tables import class_label, features, structs, write

IMAGES = encoded(12)
BAD = b"<html>404</html>"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ActorPool", lambda *_, **__: in_process)


def write_arrow(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    with (
        pa.OSFile(str(path.with_suffix(".arrow")), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def write_table(path: Path, columns: dict[str, Any]) -> None:
    write(path.with_suffix(".parquet"), columns)


WRITERS = {"parquet": write_table, "arrow": write_arrow}
COLUMNS: dict[str, Any] = {
    "struct": lambda images: structs(images=images),
    "bytes": lambda images: pa.array(images, pa.binary()),
    "lists": lambda images: pa.array([[data] for data in images], pa.list_(pa.binary())),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("column", COLUMNS)
def test_rows_of_files_of_one_name_are_told_apart(writer: str, column: str, tmp_path: Path) -> None:
    """A row has the same path in the source, in training on raw files, in the quarantine and in prepared shards."""
    for folder in ("a", "b"):
        image = COLUMNS[column]([BAD, *IMAGES[6 * (folder == "b") :][:6]])
        WRITERS[writer](tmp_path / "in" / folder / "0", {"image": image})
    paths = {item.path for item in opened(tmp_path / "in")[1]}
    assert len(paths) == 14 and {path.split("/")[0] for path in paths} == {"a", "b"}
    raw = Counter[str]()
    for index in open_splits(str(tmp_path / "in"), 12).indexes.values():
        for group in index.groups:
            raw.update(read_rows(group, np.arange(group.rows)[::-1])["path"].to_pylist())
    assert raw == Counter(paths)
    prepare(
        PrepareConfig(str(tmp_path / "out"), input=str(tmp_path / "in"), image_size=12, max_bad_fraction=0.5)
    )
    stored = Counter[str]()
    for index in open_splits(str(tmp_path / "out")).indexes.values():
        for group in index.groups:
            stored.update(read_rows(group, np.arange(group.rows))["path"].to_pylist())
    bad = listed(tmp_path / "out")
    assert {path.split("/")[0] for path in bad} == {"a", "b"} and len(bad) == 2
    assert stored + Counter(bad.keys()) == Counter(paths)


def unknown_in_parquet(root: Path) -> None:
    for folder in ("a", "b"):
        columns = {"image": structs(images=IMAGES[:4]), "label": [0, 1, 7, 1]}
        write(root / folder / "0.parquet", columns, features(label=class_label("x", "y")))


def unknown_in_tars(root: Path) -> None:
    """Write tars whose first label is a number, so that only numbers are classes."""
    for folder, names in (("a", ("0", "1", "2")), ("b", ("cat", "1", "dog\nowl"))):
        put(root, f"{folder}/0.tar", data=tar_bytes(IMAGES[:6], names=names))


def unknown_in_arrow(root: Path) -> None:
    for folder in ("a", "b"):
        write_arrow(root / folder / "0", {"image": structs(images=IMAGES[:3]), "label": [0, 10**9, 1]})


@pytest.mark.parametrize("make", [unknown_in_parquet, unknown_in_tars, unknown_in_arrow])
def test_labels_of_no_class_are_named_alike_in_raw_and_in_prepared_data(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make(tmp_path / "in")
    prepare(
        PrepareConfig(str(tmp_path / "out"), input=str(tmp_path / "in"), image_size=12, max_bad_fraction=0.9)
    )
    entries = listed(tmp_path / "out")
    told = list[dict[str, str]]()
    from pipeline.data.sources.registry import Opened

    describe = Opened.describe
    monkeypatch.setattr(Opened, "describe", lambda self, *a: (told.extend(a[2]), describe(self, *a))[1])
    splits = open_splits(str(tmp_path / "in"), 12)
    assert {entry["path"]: entry["reason"] for entry in told} == entries
    assert "\n" not in splits.found and all("\n" not in reason for reason in entries.values())
    if make is not unknown_in_arrow:
        assert len(entries) > 1


# Tables without rows.


def image_column(count: int, kind: str) -> dict[str, Any]:
    images = IMAGES[:count]
    return {"image" if kind != "odd" else "x": COLUMNS["struct" if kind == "struct" else "bytes"](images)}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", ["struct", "bytes", "odd"])
@pytest.mark.parametrize("empty", [1, 6])
def test_a_table_without_rows_is_named_and_the_others_are_read(
    writer: str, kind: str, empty: int, tmp_path: Path
) -> None:
    for i in range(empty):
        WRITERS[writer](tmp_path / f"{i}", image_column(0, kind))
    WRITERS[writer](tmp_path / "9", image_column(5, kind))
    found, items = opened(tmp_path)
    assert [item.data for item in items] == IMAGES[:5]
    assert found.listing.ignored == {f"{i}.{writer}": "holds no rows" for i in range(empty)}
    assert found.listing.used == {f"9.{writer}"} and not found.listing.bad
    named = Request(20, image_column="x" if kind == "odd" else "image")
    assert open_source("auto", str(tmp_path), named).listing.ignored == found.listing.ignored
    assert sum(index.rows for index in open_splits(str(tmp_path), 12).indexes.values()) == 5


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", ["struct", "bytes", "odd"])
@pytest.mark.parametrize("source", ["auto", "its own"])
def test_tables_that_all_have_no_rows_are_said_to_have_none(
    writer: str, kind: str, source: str, tmp_path: Path
) -> None:
    for i in range(2):
        WRITERS[writer](tmp_path / f"{i}", image_column(0, kind))
    own = {"parquet": "huggingface", "arrow": "arrow"}[writer]
    with pytest.raises(InputError, match=rf"0\.{writer} holds no rows, nor does any other file$"):
        open_source("auto" if source == "auto" else own, str(tmp_path), Request(20))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds no rows"):
        open_splits(str(tmp_path), 12, Reading())


def test_a_table_without_rows_is_no_source(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", image_column(0, "struct"))
    assert not is_parquet(open_tree(str(tmp_path)))
    put(tmp_path, "a.tar", data=tar_bytes(IMAGES))
    found, items = opened(tmp_path)
    assert found.source == "webdataset" and len(items) == 12
    assert found.listing.ignored == {"0.parquet": "a Parquet file beside --source webdataset"}
