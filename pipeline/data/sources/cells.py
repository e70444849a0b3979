"""Reads the cells of Parquet and Arrow files: images with their names, and labels."""

import errno
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from pipeline import storage
from pipeline.data.labels import class_text
from pipeline.data.sources.parts import Item
from pipeline.errors import InputError
from pipeline.redact import printable

NO_IMAGE = "the row holds no image"
ELSEWHERE = "its path leads out of the table's folder, so it is not read"
_EXTENSION = b"ARROW:extension:name"
# A row may name a file that is missing. That is no failure of the storage.
_NOT_THERE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_NOT_THERE_ERRORS = (errno.ELOOP, errno.ENAMETOOLONG)
_ABSOLUTE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|.*(://|::|\0)", re.DOTALL)


@dataclass(frozen=True)
class Columns:
    """The columns to read of a file. The defaults are those of jobs/prepare.py.

    Attributes:
        image, label: names of the columns; label is "" without a column of labels.
        classes: names of the classes 0, 1, …, if labels are numbers with known names.
    """

    image: str = "image"
    label: str = "label"
    classes: tuple[str, ...] = ()


Form = Literal["", "bytes", "struct", "text", "list"]


def form_of(kind: pa.DataType) -> Form:
    """The form in which a column of this type can hold images.

    Returns:
        "bytes", "struct" (bytes and path), "text" (paths), "list" (lists of one of these), or "" for none.
    """
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if is_binary(kind):
        return "bytes"
    if is_text(kind):
        return "text"
    if is_list(kind):
        return "list" if form_of(kind.value_type) in ("bytes", "struct", "text") else ""
    if pa.types.is_struct(kind) and (place := kind.get_field_index("bytes")) >= 0:
        data, path = kind.field(place).type, kind.get_field_index("path")
        named = path >= 0 and is_text(kind.field(path).type)
        return "struct" if is_binary(data) or (pa.types.is_null(data) and named) else ""
    return ""


def one_form(kind: pa.DataType) -> Form:
    """The form of a single image in a column of images or of lists of images."""
    return form_of(kind.value_type if is_list(kind) else kind)


def is_binary(kind: pa.DataType) -> bool:
    tests = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(test(kind) for test in tests)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_list(kind: pa.DataType) -> bool:
    flat = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return flat or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)


def is_foreign(field: pa.Field) -> bool:
    """True if a column has an extension type, which a library reads with its own code, at any depth."""
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType) or _EXTENSION in (field.metadata or {}):
        return True
    if pa.types.is_dictionary(kind):
        return isinstance(kind.value_type, pa.BaseExtensionType)
    return any(is_foreign(kind.field(i)) for i in range(kind.num_fields))


def check_names(fields: Iterable[pa.Field]) -> None:
    """Raises UnicodeDecodeError if the name of a column, or of a field in it, is not valid text."""
    for field in fields:
        _ = field.name
        check_names(field.type.field(i) for i in range(field.type.num_fields))


def present(uri: str, schema: pa.Schema, columns: Columns) -> list[str]:
    """The names of the columns to read: images and, if the file has them, labels.

    Some extension types are read by Python classes. One of Ray's holds pickles, so looking at a value runs code of
    the file's author. Such a column is refused here. Other columns of the file are never looked at.

    Raises:
        InputError: there is no such column of images, or one of these columns has an extension type.
    """
    if columns.image not in schema.names:
        raise InputError(
            f"{uri}: no column `{columns.image}`; it has {', '.join(map(printable, schema.names))}"
        )
    names = [name for name in (columns.image, columns.label) if name in schema.names]
    for name in names:
        check_plain(uri, schema, name)
    return names


def check_plain(uri: str, schema: pa.Schema, name: str) -> None:
    """Raises InputError for a column that has an extension type, or whose name occurs twice."""
    if len(places := schema.get_all_field_indices(name)) > 1:
        raise InputError(f"{uri}: has {len(places)} columns {printable(name)}: give each its own name")
    if is_foreign(schema.field(name)):
        kind = schema.field(name).type
        own = f"of the type {kind.extension_name}" if isinstance(kind, pa.BaseExtensionType) else str(kind)
        raise InputError(f"{uri}: column {printable(name)} is {own}, not plain data: refused")


def texts(column: pa.Array) -> list[Any]:
    """The values of a column of any type. Bytes that are not valid UTF-8 become replacement characters."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        if is_text(column.type):
            return [
                v.as_buffer().to_pybytes().decode(errors="replace") if v.is_valid else None for v in column
            ]
        if is_list(column.type):
            return [texts(value.values) if value.is_valid else None for value in column]
        raise


def images_of(column: pa.Array) -> list[list[tuple[bytes | None, str | None]]]:
    """The images of each row as (bytes, path): one image, or any number if the column holds lists."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_list(column.type):
        rows = (images_of(row.values) if row.is_valid else [] for row in column)
        return [[image for one in row for image in one] for row in rows]
    none = [None] * len(column)
    if is_text(column.type):
        return [[pair] for pair in zip(none, texts(column), strict=True)]
    if not pa.types.is_struct(column.type):
        return [[pair] for pair in zip(column.to_pylist(), none, strict=True)]
    fields = dict(
        zip((column.type.field(i).name for i in range(column.type.num_fields)), column.flatten(), strict=True)
    )
    path = fields.get("path")
    # Some writers store text as bytes.
    paths = none if path is None or not (is_text(path.type) or is_binary(path.type)) else texts(path)
    names = [name.decode(errors="replace") if isinstance(name, bytes) else name for name in paths]
    data = fields["bytes"].to_pylist() if "bytes" in fields else none
    return [[pair] for pair in zip(data, names, strict=True)]


def name_beside(file: str, path: str) -> str | None:
    """The name, below the root, of a file that a table names by a path relative to the table's own folder.

    Args:
        file: the table's name below the root.
        path: the path in the table.

    Returns:
        None for an absolute path, a URL, or a path that leads out of the folder.
    """
    if "/" not in path:
        path = path.replace("\\", "/")  # a Windows path
    normal = posixpath.normpath(path)
    if not path or _ABSOLUTE.match(path) or normal.split("/")[0] in ("..", "."):
        return None
    return posixpath.join(posixpath.dirname(file), normal)


def read_beside(root: str, file: str, path: str) -> tuple[bytes, str]:
    """Reads an image that a table names: its bytes and "", or nothing and the reason."""
    if (name := name_beside(file, path)) is None:
        return b"", ELSEWHERE
    try:
        return storage.read_bytes(storage.join(root, name)), ""
    except OSError as error:
        if not isinstance(error, _NOT_THERE) and error.errno not in _NOT_THERE_ERRORS:
            raise
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        words = "it is not there" if missing else error.strerror or type(error).__name__
        return b"", f"its file {printable(name)} can't be read: {words}"


def named(place: str, own: str | None) -> str:
    """The path of an image in a row: the row's place in the source, followed by the image's own name if it has one."""
    own = posixpath.basename(own.replace("\\", "/")) if own else ""
    return printable(f"{place}/{own}" if own else place)


def items_of(
    images: pa.Array,
    labels: pa.Array | None,
    classes: tuple[str, ...],
    places: Iterable[str],
    beside: Callable[[str], tuple[bytes, str]],
) -> Iterator[list[Item]]:
    """The images of each row. A row without an image gives one item with that reason.

    Args:
        images: cells of the column of images.
        labels: labels of the same rows; None if the file has none.
        classes: names of the classes 0, 1, …
        places: a name for each row, unique within the source.
        beside: function that reads an image by its path and returns its bytes and "", or nothing and the reason.
    """
    values = texts(labels) if labels is not None else None
    for number, (row, place) in enumerate(zip(images_of(images), places, strict=True)):
        label, unfit = class_text(values[number], classes) if values is not None else (None, "")
        items = []
        for k, (data, path) in enumerate(row):
            name = f"{place}/{k}" if len(row) > 1 else place
            reason = ""
            if data is None and path:
                data, reason = beside(path)
            elif data is None:
                reason = NO_IMAGE
            reason = reason or unfit
            items.append(Item(named(name, path), b"" if reason else data or b"", label, reason))
        yield items or [Item(printable(place), b"", label, NO_IMAGE)]
