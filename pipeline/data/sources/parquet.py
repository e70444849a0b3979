"""Reads Parquet files as a source: finds those that hold images, and cuts them into parts."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.data.sources.cells import Columns, one_form
from pipeline.data.sources.columns import choose
from pipeline.data.sources.fetch import THREADS, fault_of_file
from pipeline.data.sources.label_columns import name_labels
from pipeline.data.sources.look import Look, features_of, files_beside, lies_beside
from pipeline.data.sources.parquet_files import (
    PREPARED,
    iterate,
    open_parquet,
    opened,
    read_row_group,
)
from pipeline.data.sources.parquet_part import ParquetPart
from pipeline.data.sources.parts import Request, SourceListing
from pipeline.data.sources.splits import splits_of_files
from pipeline.data.sources.tables import are_source, look_at_all, names_beside
from pipeline.data.sources.tree import Tree
from pipeline.errors import InputError
from pipeline.redact import printable

__all__ = [
    "ParquetPart",
    "class_names",
    "is_parquet",
    "list_parquet",
    "open_parquet",
    "read_row_group",
    "row_counts",
]
SUFFIXES = (".parquet", ".parq", ".pq")
_ROWS = 4096
_POINTER = b"version https://git-lfs"


def row_counts(uri: str) -> list[int]:
    """Rows of each row group of a file that jobs/prepare.py or jobs/generate.py wrote.

    Raises:
        InputError: the file is not a Parquet file, or has no column `image`.
    """
    metadata = opened(uri, PREPARED).file.metadata
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def class_names(uri: str) -> tuple[str, ...]:
    """The names that such a file notes for its labels; empty if it notes none. Raises InputError as `row_counts`."""
    feature = features_of(opened(uri, PREPARED).file.schema_arrow).get(PREPARED.label)
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def is_parquet(tree: Tree) -> bool:
    """True if Parquet files are the source; see `tables.are_source`."""
    return are_source(tree, _names(tree), partial(_look_at, tree))


def list_parquet(tree: Tree, request: Request) -> SourceListing:
    """The Parquet files of a folder that hold images, in parts of about `request.images_per_part` images.

    Raises:
        InputError: as `columns.choose`.
    """
    found, bad = look_at_all(partial(_look_at, tree), _names(tree))
    choice = choose(found, request, "Parquet")
    looks = [look for look in found if look.name in choice.columns]
    classes, columns = name_labels(looks, choice.columns)
    splits = splits_of_files(columns)
    with ThreadPoolExecutor(THREADS) as pool:
        cut = pool.map(lambda look: list(_cut(tree, look, columns, splits, request.images_per_part)), looks)
        parts = tuple(part for some in cut for part in some)
    used = frozenset(name for part in parts for name in part.names) | columns.keys()
    return SourceListing(parts, used, classes=classes, ignored=choice.ignored, bad={**bad, **choice.bad})


def _names(tree: Tree) -> list[str]:
    return [name for name in tree.files if name.lower().endswith(SUFFIXES)]


def _look_at(tree: Tree, name: str) -> Look | str:
    """The columns of a file from its footer, or the reason why it can't be opened."""
    uri = tree.uri(name)
    try:
        file = open_parquet(uri)
    except OSError as error:
        return fault_of_file(error, uri)
    except InputError as error:
        if tree.head(name).startswith(_POINTER):
            return "not a Parquet file but a Git LFS pointer: run `git lfs pull`"
        return str(error).removeprefix(f"{uri}: ")
    groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))

    def read(column: str, rows: int) -> Iterator[pa.Array]:
        anew = open_parquet(uri, piecewise=True)
        for group in range(len(groups)):
            for batch in iterate(anew, printable(name), group, [column], rows):
                yield batch.column(column)

    schema = file.schema_arrow
    return Look(name, schema, features_of(schema), read, partial(lies_beside, tree, name), groups)


def _cut(
    tree: Tree, look: Look, columns: dict[str, Columns], splits: dict[str, str], images: int
) -> Iterator[ParquetPart]:
    name, groups = look.name, look.groups or ()
    beside = _named_beside(tree, look, columns[name].image)
    start = 0
    while start < len(groups):
        stop, held = start + 1, groups[start]
        while stop < len(groups) and held + groups[stop] <= images:
            held, stop = held + groups[stop], stop + 1
        if held:
            named = sorted(set().union(*beside[start:stop]))
            yield ParquetPart(
                tree.root, (name, *named), start, stop - start, columns[name], split=splits[name]
            )
        start = stop


def _named_beside(tree: Tree, look: Look, image: str) -> list[set[str]]:
    """The image files beside a Parquet file that its rows name, for each row group."""
    name, form = look.name, one_form(look.type_of(image))
    found = [set[str]() for _ in look.groups or ()]
    if form == "bytes" or not files_beside(tree):
        return found
    anew = open_parquet(tree.uri(name), piecewise=True)
    for group, named in enumerate(found):
        about = anew.metadata.row_group(group)
        leaves = [about.column(i) for i in range(about.num_columns)]
        inside = {
            leaf.path_in_schema: leaf for leaf in leaves if f"{leaf.path_in_schema}.".startswith(f"{image}.")
        }
        paths = [image] if form == "text" else [leaf for leaf in inside if leaf.endswith(".path")]
        if paths and not any(_is_whole(leaf) for place, leaf in inside.items() if place.endswith(".bytes")):
            for batch in iterate(anew, printable(name), group, paths, _ROWS):
                named.update(*names_beside(tree, name, batch.column(image)))
    return found


def _is_whole(leaf: Any) -> bool:
    """True if the statistics of a column say that it has no nulls."""
    return leaf.is_stats_set and leaf.statistics.has_null_count and not leaf.statistics.null_count
