"""Images in Parquet files of the Hugging Face convention: a column `image` of {bytes, path}, a column `label`."""

import json
import posixpath
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.labels import label_text, name_classes, stored_numbers
from pipeline.data.sources.parts import Item, Part, SourceListing
from pipeline.errors import InputError
from pipeline.redact import one_line

OPEN_FILES = 64


@dataclass(frozen=True)
class ParquetPart(Part):
    """Row groups that follow each other in one file.

    Attributes:
        classes: names of integer labels, where the file has them.
    """

    start: int
    count: int
    classes: tuple[str, ...] = ()

    def read(self) -> Iterator[Item]:
        for group in range(self.start, self.start + self.count):
            table = read_row_group(self.uri, group)
            columns = (table[name].to_pylist() for name in ("bytes", "label", "path"))
            for data, label, name in zip(*columns, strict=True):
                path = f"{posixpath.basename(self.uri)}/{group}/{posixpath.basename(name)}"
                yield Item(path, data or b"", label_text(label, self.classes))

    def table(self, rows: np.ndarray) -> pa.Table:
        groups = range(self.start, self.start + self.count)
        table = pa.concat_tables([read_row_group(self.uri, group) for group in groups])
        # Numbers first: Arrow can't take rows of every kind of text.
        return table.set_column(1, "label", stored_numbers(table["label"])).take(rows)


def open_parquet(uri: str) -> pq.ParquetFile:
    """A file from outside, opened so that nothing in it is run.

    A file may ask for a type that Python classes read. One of Ray's holds pickles: whoever looks at a value runs
    what the file's author wrote.

    Raises:
        InputError: not a Parquet file, or a column of such a type.
    """
    fs, path = storage.open_fs(uri)
    try:
        # A local file is read by pyarrow itself: through Python it costs a tenth of decoding small images.
        file = pq.ParquetFile(path if storage.is_local(uri) else fs.open(path, "rb"))
    except Exception as error:  # pyarrow raises anything on a damaged footer
        if storage.is_storage_error(error):
            raise
        raise InputError(f"{uri}: not a Parquet file: {one_line(error)}") from None
    for column in file.schema_arrow:
        if _has_python_type(column.type):
            raise InputError(f"{uri}: column {column.name} is {column.type}, not plain data: refused")
    return file


@lru_cache(maxsize=OPEN_FILES)
def _kept_open(uri: str, thread: int) -> pq.ParquetFile:
    """A reading thread reads a file's footer once, not once a row group; no two may read through one open file."""
    return open_parquet(uri)


def _has_python_type(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.ExtensionType):
        return True
    return any(_has_python_type(kind.field(i).type) for i in range(kind.num_fields))


def row_counts(uri: str) -> list[int]:
    """Rows of each row group.

    Raises:
        InputError: not a Parquet file, or one without a column `image`.
    """
    file = open_parquet(uri)
    if "image" not in file.schema_arrow.names:
        raise InputError(f"{uri}: no column `image`; it has {', '.join(file.schema_arrow.names)}")
    return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]


def class_names(uri: str) -> tuple[str, ...]:
    """The classes, where the file names them as `datasets` does or has labels that are no integers."""
    file = open_parquet(uri)
    kind = file.schema_arrow.field("label").type if "label" in file.schema_arrow.names else pa.null()
    if not pa.types.is_integer(kind) and not pa.types.is_null(kind):
        texts = set(map(label_text, file.read(columns=["label"])["label"].to_pylist()))
        return name_classes(text for text in texts if text is not None)
    try:
        metadata = file.schema_arrow.metadata or {}
        features: dict[str, Any] = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(features["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return ()


def read_row_group(uri: str, number: int) -> pa.Table:
    """The images of one row group, still encoded.

    Returns:
        columns bytes (binary), label (as in the file, or null) and path (string). Rows that damage makes unreadable
        are there, with no bytes.
    """
    file = _kept_open(uri, threading.get_ident())
    count, prefix = file.metadata.row_group(number).num_rows, f"{posixpath.basename(uri)}/{number}"
    columns = [name for name in ("image", "label") if name in file.schema_arrow.names]
    try:
        table = file.read_row_group(number, columns=columns)
        image = table["image"].combine_chunks()
        struct = pa.types.is_struct(image.type)
        data = (image.field("bytes") if struct else image).cast(pa.binary())
        own = (
            image.field("path").cast(pa.string())
            if struct and image.type.get_field_index("path") >= 0
            else None
        )
        label = table["label"] if "label" in columns else pa.nulls(count)
    except Exception as error:
        if storage.is_storage_error(error):
            raise
        data, label = pa.nulls(count, pa.binary()), pa.nulls(count)
        own, prefix = None, f"{prefix} ({type(error).__name__})"
    return pa.table({"bytes": data, "label": label, "path": _paths(own, prefix, count)})


def _paths(own: pa.Array | None, prefix: str, count: int) -> pa.Array:
    """The images' own names; where they have none, their place in the file."""
    if own is not None and not own.null_count:
        return own
    names = own.to_pylist() if own is not None else [None] * count
    return pa.array([name or f"{prefix}/{i:06d}" for i, name in enumerate(names)], pa.string())


def list_parquet(uri: str, files: list[str], images_per_part: int) -> SourceListing:
    parts, names = list[Part](), dict[tuple[str, ...], tuple[str, ...]]()
    for file in storage.with_suffix(files, ".parquet"):
        rows, found = row_counts(file), class_names(file)
        classes = names.setdefault(found, found)  # one object for all parts: it travels once
        start = count = images = 0
        for group, more in enumerate([*rows, images_per_part]):
            if count and images + more > images_per_part:
                parts.append(ParquetPart(file, start, count, classes))
                start, count, images = group, 0, 0
            count, images = count + 1, images + more
    if not parts:
        raise InputError(f"--input {uri}: no .parquet files with images in it")
    classes = tuple(sorted(set[str]().union(*names))) if len(names) > 1 else next(iter(names))
    return SourceListing(tuple(parts), classes=classes)
