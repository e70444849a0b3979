"""Parquet files as a source: those of a folder that hold images, and the parts to read them in."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.data.sources.cells import Columns, images_of, name_beside, one_form
from pipeline.data.sources.columns import choose, is_source
from pipeline.data.sources.fetch import THREADS
from pipeline.data.sources.label_columns import name_labels
from pipeline.data.sources.look import Look, features_of, files_beside, lies_beside
from pipeline.data.sources.parquet_files import (
    PREPARED,
    _kept_open,
    iterate,
    open_parquet,
    opened,
    read_row_group,
)
from pipeline.data.sources.parquet_part import ParquetPart
from pipeline.data.sources.parts import Request, SourceListing
from pipeline.data.sources.splits import splits_of_files
from pipeline.data.sources.tree import Tree, printable
from pipeline.errors import InputError

__all__ = ["ParquetPart", "is_parquet", "list_parquet", "open_parquet", "read_row_group", "row_counts"]
SUFFIXES = (".parquet", ".parq", ".pq")
_FIRST = 32  # files to look into before all others
_ROWS = 4096
_POINTER = b"version https://git-lfs"


def row_counts(uri: str) -> list[int]:
    """Rows of each row group of a file that was prepared or generated.

    Raises:
        InputError: not a Parquet file, or one without a column `image`.
    """
    metadata = opened(uri, PREPARED).file.metadata
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def is_parquet(tree: Tree) -> bool:
    """Whether some Parquet file holds images (see `columns.is_source`), or none of them can be opened."""
    names, opened_any = _names(tree), False
    for some in (names[:_FIRST], names[_FIRST:]):
        files, _ = _open_all(tree, some)
        opened_any = opened_any or bool(files)
        if is_source([file.look for file in files]):
            return True
    return bool(names) and not opened_any


def list_parquet(tree: Tree, request: Request) -> SourceListing:
    """The Parquet files of a folder that hold images, in parts of some row groups.

    Raises:
        InputError: see `columns.choose`.
    """
    _kept_open.cache_clear()  # files of a remote store may be others by now
    files, bad = _open_all(tree, _names(tree))
    choice = choose([file.look for file in files], request, "Parquet")
    files = [file for file in files if file.look.name in choice.columns]
    classes, columns = name_labels([file.look for file in files], choice.columns)
    splits = splits_of_files(columns)
    with ThreadPoolExecutor(THREADS) as pool:
        per_part = request.images_per_part
        cut = pool.map(
            lambda f: list(_cut(tree, f, columns[f.look.name], splits[f.look.name], per_part)), files
        )
        parts = tuple(part for some in cut for part in some)
    used = frozenset(name for part in parts for name in part.names) | columns.keys()
    return SourceListing(parts, used, classes=classes, ignored=choice.ignored, bad={**bad, **choice.bad})


def _names(tree: Tree) -> list[str]:
    return [name for name in tree.files if name.lower().endswith(SUFFIXES)]


@dataclass(frozen=True)
class _File:
    """What its footer says of a file: its columns, and the rows of each row group."""

    look: Look
    rows: tuple[int, ...]


def _open_all(tree: Tree, names: list[str]) -> tuple[list[_File], dict[str, str]]:
    """The files that can be opened, and the others with the reason."""
    files, bad = list[_File](), dict[str, str]()
    with ThreadPoolExecutor(THREADS) as pool:
        for name, found in zip(names, pool.map(partial(_open, tree), names), strict=True):
            if isinstance(found, str):
                bad[name] = found
            else:
                files.append(found)
    return files, bad


def _open(tree: Tree, name: str) -> _File | str:
    uri = tree.uri(name)
    try:
        file = open_parquet(uri)
    except (FileNotFoundError, PermissionError) as error:
        return f"can't be read: {error.strerror or type(error).__name__}"
    except InputError as error:
        if tree.head(name).startswith(_POINTER):
            return "no Parquet file: a pointer to one, which `git lfs pull` fetches"
        return str(error).removeprefix(f"{uri}: ")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]

    def read(column: str, rows: int) -> Iterator[pa.Array]:
        anew = open_parquet(uri, piecewise=True)
        for group in range(len(groups)):
            for batch in iterate(anew, printable(name), group, [column], rows):
                yield batch.column(column)

    schema = file.schema_arrow
    return _File(
        Look(name, schema, features_of(schema), read, partial(lies_beside, tree, name)), tuple(groups)
    )


def _cut(tree: Tree, file: _File, columns: Columns, split: str, images: int) -> Iterator[ParquetPart]:
    name, beside = file.look.name, _named_beside(tree, file, columns.image)
    alone, start, held, named = (name,), 0, 0, set[str]()
    for group, (more, others) in enumerate(zip(file.rows, beside, strict=True)):
        if group > start and held + more > images:
            names = (name, *sorted(named)) if named else alone
            yield ParquetPart(tree.root, names, start, group - start, columns, split=split)
            start, held, named = group, 0, set()
        held, named = held + more, named | others
    if held:
        names = (name, *sorted(named)) if named else alone
        yield ParquetPart(tree.root, names, start, len(file.rows) - start, columns, split=split)


def _named_beside(tree: Tree, file: _File, image: str) -> list[set[str]]:
    """The files beside a Parquet file that its rows name as their images, for each row group."""
    name, form = file.look.name, one_form(file.look.type_of(image))
    found = [set[str]() for _ in file.rows]
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
                pairs = (pair for row in images_of(batch.column(image)) for pair in row)
                others = (name_beside(name, path) for _, path in pairs if path)
                named.update(other for other in others if other in tree.files)
    return found


def _is_whole(leaf: Any) -> bool:
    """Whether statistics say that a column has no nulls."""
    return leaf.is_stats_set and leaf.statistics.has_null_count and not leaf.statistics.null_count
