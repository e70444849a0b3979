"""Parquet files that are damaged, too large for memory, or hold a pickle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray
from ray.data._internal.tensor_extensions.arrow import ArrowTensorArray

from pipeline.data.sources import parquet_files
from pipeline.data.sources.parquet import read_row_group
from pipeline.errors import InputError
from tests.data.tables import (
    COUNT,
    IMAGE,
    IMAGES,
    NUMBERS,
    Planted,
    binary,
    features,
    items,
    listed,
    listing,
    structs,
    write,
)


def damage(path: Path, where: Callable[[bytes], int], with_: bytes) -> None:
    data = bytearray(path.read_bytes())
    at = where(bytes(data))
    data[at : at + len(with_)] = with_
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("options", "where", "with_"),
    [
        ({"write_page_checksum": True}, lambda data: data.index(IMAGES[8]) + 40, b"\xff\xff"),
        ({"compression": "zstd"}, lambda data: data.index(b"\x28\xb5\x2f\xfd", len(data) // 2), bytes(4)),
        ({"compression": "gzip"}, lambda data: data.index(b"\x1f\x8b", len(data) // 2), bytes(10)),
        ({}, lambda data: data.index(IMAGES[8]) - 60, b"\xff" * 48),
    ],
    ids=["checksum", "zstd", "gzip", "page header"],
)
def test_what_the_reader_says_of_damage_is_an_error_with_file_and_row_group(
    tmp_path: Path, options: dict[str, Any], where: Callable[[bytes], int], with_: bytes
) -> None:
    path = tmp_path / "train.parquet"
    settings = {"compression": "none", "use_dictionary": False, "row_group_size": 8, **options}
    write(path, {"image": structs()}, features(image=IMAGE), **settings)
    damage(path, where, with_)
    parts = listing(tmp_path, 8).parts
    assert [item.data for item in parts[0].read()] == IMAGES[:8]
    for read in (
        lambda: list(parts[1].read()),
        lambda: parts[1].table(np.array([0])),
        lambda: list(parts[1].read([1])),
    ):
        with pytest.raises(InputError, match=r"^\S+train.parquet: row group 1 can't be read: \S") as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", [1, 3, 8])
def test_a_row_group_that_is_shorter_than_it_should_be_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    write(tmp_path / "a.parquet", {"image": structs()}, row_group_size=8)
    part = listing(tmp_path).parts[0]
    read, read_batches = pq.ParquetFile.read_row_group, pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **o: read(*a, **o).slice(missing))
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda *a, **o: (batch.slice(missing) for batch in read_batches(*a, **o)),
    )
    for call in (lambda: list(part.read()), lambda: list(part.read([7])), lambda: part.table(np.array([7]))):
        with pytest.raises(
            InputError, match=f"row group 0 can't be read: it holds {8 - missing} rows, its footer says 8"
        ):
            call()


def test_a_failing_storage_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", {"image": structs()})
    part = listing(tmp_path).parts[0]
    for error in (TimeoutError("slow"), OSError(5, "Input/output error"), ConnectionResetError("gone")):

        def fail(*_: object, error: OSError = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(pq.ParquetFile, "iter_batches", fail)
            patch.setattr(pq.ParquetFile, "read_row_group", fail)
            for read in (lambda: list(part.read()), lambda: part.table(np.array([0]))):
                with pytest.raises(type(error)):
                    read()


@pytest.mark.parametrize("column", [structs(), binary(), listed(pa.list_), structs().dictionary_encode])
def test_a_large_row_group_is_read_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: Any
) -> None:
    if callable(column):
        column = pa.chunked_array([binary(pa.large_binary())])
    write(tmp_path / "a.parquet", {"image": column, "label": NUMBERS}, row_group_size=10)
    part = listing(tmp_path, 100).parts[0]
    rows = np.array([15, 3, 9, 10, 3])
    whole, some, table = list(part.read()), list(part.read(rows.tolist())), part.table(rows)
    assert [item.data for item in whole] == IMAGES and some == [whole[row] for row in rows]
    monkeypatch.setattr(parquet_files, "BIG_GROUP", 0)
    for piece in (1, 700, 2**20):
        monkeypatch.setattr(parquet_files, "PIECE", piece)
        assert list(part.read()) == whole
        assert list(part.read(rows.tolist())) == some
        assert part.table(rows).equals(table)
    assert table["bytes"].to_pylist() == [IMAGES[row] for row in rows]
    assert table["bytes"].type == pa.large_binary()


def test_rows_that_are_too_long_together_are_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow refuses to read more than 2 GiB of a struct's bytes at once."""
    write(tmp_path / "a.parquet", {"image": structs()})
    part, read = listing(tmp_path, 100).parts[0], pq.ParquetFile.iter_batches

    def refusing(file: pq.ParquetFile, batch_size: int, **options: Any) -> Any:
        for number, batch in enumerate(read(file, batch_size=min(batch_size, 3), **options)):
            if batch_size > 1 and number == 2:
                raise pa.ArrowNotImplementedError(
                    "Nested data conversions not implemented for chunked array outputs"
                )
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", refusing)
    assert [item.data for item in part.read()] == IMAGES


@pytest.mark.parametrize("column", ["image", "label", "path", "other"])
def test_nothing_of_a_file_is_run(tmp_path: Path, column: str) -> None:
    mark, root = tmp_path / "mark", tmp_path / "data"
    planted = ArrowPythonObjectArray.from_objects([Planted(mark)] * COUNT)
    path = planted if column == "path" else pa.array(["a.png"] * COUNT)
    image = pa.StructArray.from_arrays([binary(), path], ["bytes", "path"])
    columns = {"image": image, "label": pa.array(NUMBERS)} | ({column: planted} if column != "path" else {})
    write(root / "a.parquet", columns)
    pq.read_table(root / "a.parquet").to_pylist()
    assert mark.exists()  # plain pyarrow runs the pickle, so the danger is real
    mark.unlink()
    if column == "other":
        assert [item.data for item in items(listing(root))] == IMAGES
    else:
        refused = {"path": "image"}.get(column, column)
        with pytest.raises(InputError, match=f"a.parquet: column {refused} is .*, not plain data: refused"):
            listing(root)
        with pytest.raises(InputError, match="not plain data: refused"):
            read_row_group(str(root / "a.parquet"), 0)
    assert not mark.exists()


@pytest.mark.parametrize(
    "other",
    [
        lambda: ArrowTensorArray.from_numpy(np.zeros((COUNT, 2, 2))),
        lambda: pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)] * COUNT, pa.binary(16))),
        lambda: pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}"] * COUNT)),
    ],
)
def test_types_of_others_do_no_harm_in_columns_that_are_not_read(
    tmp_path: Path, other: Callable[[], Any]
) -> None:
    write(tmp_path / "a.parquet", {"photo": structs(), "other": other(), "label": NUMBERS})
    assert [item.data for item in items(listing(tmp_path))] == IMAGES
    for flag in ("image_column", "label_column"):
        with pytest.raises(InputError, match=r"column other is of the type .*, not plain data: refused"):
            listing(tmp_path, **{flag: "other"})  # type: ignore[arg-type]
