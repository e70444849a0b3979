"""Looks into a Parquet or Arrow file before its images are read: columns, and the notes of `datasets` on them."""

import json
import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline import storage
from pipeline.data.sources.cells import images_of, name_beside
from pipeline.data.sources.tree import Tree
from pipeline.errors import InputError
from pipeline.redact import printable

_ROWS = 4  # rows to look at for images
# Files with these suffixes are never images.
_NO_IMAGES = (
    ".parquet", ".parq", ".pq", ".arrow", ".feather", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".md", ".yaml", ".yml",
    ".py", ".tar",
)  # fmt: skip
_LONGEST_NAME = 255  # bytes; file systems allow no longer name
_EMPTY = 4096  # a column without an image in so many rows counts as empty


@dataclass(frozen=True)
class Look:
    """The columns of one file, and functions to look into it.

    Attributes:
        name: name below the root.
        features: the features that `datasets` noted, by column.
        read: reads one column, in pieces of about the given number of rows.
        beside: returns True if a path, relative to the file's own folder, leads to a file.
        groups: rows of each row group; None if only reading tells.
    """

    name: str
    schema: pa.Schema
    features: dict[str, Any]
    read: Callable[[str, int], Iterator[pa.Array]]
    beside: Callable[[str], bool]
    groups: tuple[int, ...] | None = None

    @property
    def fields(self) -> list[pa.Field]:
        """The file's columns."""
        return [self.schema.field(i) for i in range(len(self.schema))]

    def type_of(self, column: str) -> pa.DataType:
        """The type of a column whose name occurs once."""
        return self.schema.field(column).type

    def has_rows(self) -> bool:
        """True if there is any row, or damage where a row may have been."""
        if self.groups is not None:
            return any(self.groups)
        try:
            return any(len(array) for field in self.fields[:1] for array in self.read(field.name, _ROWS))
        except InputError:  # reading the rows will report the damage
            return True

    def first(self, column: str) -> list[tuple[bytes | None, str | None]]:
        """Bytes and path of some images of a column, from the first rows that hold any."""
        seen = 0
        for array in self.read(column, _ROWS):
            if found := [pair for row in images_of(array) for pair in row if pair[0] or pair[1]]:
                return found
            seen += len(array)
            if seen >= _EMPTY:
                break
        return []

    def kind(self, column: str) -> str:
        """The type that `datasets` notes for a column or the items of its lists: Image, ClassLabel, Value, …; or ""."""
        return str(_inner(self.features.get(column)).get("_type", ""))

    def names(self, column: str) -> tuple[str, ...]:
        """The class names of a column, if `datasets` noted them."""
        names = _inner(self.features.get(column)).get("names") if self.kind(column) == "ClassLabel" else None
        if isinstance(names, dict):
            names = [names[key] for key in sorted(names, key=int)]
        return tuple(map(str, names or ()))


def lies_beside(tree: Tree, file: str, path: str) -> bool:
    """True if a path, relative to the folder of a file in the tree, leads to a file.

    Raises:
        StorageError: the storage can't tell.
    """
    if (name := name_beside(file, path)) is None:
        return False
    if name in tree.files:
        return True
    # The tree may be only a few of the folder's files. Text that is no path may end like one.
    if "\0" in name or any(len(part.encode()) > _LONGEST_NAME for part in name.split("/")):
        return False
    suffix = posixpath.splitext(name)[1].lower()
    return suffix in Image.registered_extensions() and storage.exists(tree.uri(name))


def files_beside(tree: Tree) -> bool:
    """True if the tree has files that may be images which tables name."""
    return not all(name.lower().endswith(_NO_IMAGES) for name in tree.files)


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """The features that `datasets` noted in a schema; empty if there are none or they make no sense."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _inner(feature: Any) -> dict[str, Any]:
    while isinstance(feature, list) or (isinstance(feature, dict) and "feature" in feature):
        feature = feature["feature"] if isinstance(feature, dict) else feature[0] if feature else None
    return feature if isinstance(feature, dict) else {}


def check_there(flag: str, looks: list[Look], wanted: str) -> None:
    """Raises InputError, naming the columns that exist, if no file has the requested column."""
    if looks and not any(wanted in look.schema.names for look in looks):
        there = ", ".join(map(printable, looks[0].schema.names))
        raise InputError(f"{flag} {wanted}: there is no such column; {printable(looks[0].name)} has {there}")


def listed(names: Iterable[str]) -> str:
    """Names as text: "a, b and c"."""
    *some, last = map(printable, names)
    return f"{', '.join(some)} and {last}" if some else last
