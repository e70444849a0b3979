"""Reads Arrow files: folders of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`, and other IPC files."""

import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.data.sources.arrow_files import (
    Stored,
    forget_open_files,
    opened,
    schema_of,
    stored_batches,
    walk,
)
from pipeline.data.sources.cells import (
    Columns,
    is_list,
    items_of,
    one_form,
    read_beside,
)
from pipeline.data.sources.columns import choose
from pipeline.data.sources.fetch import fault_of_file
from pipeline.data.sources.label_columns import name_labels
from pipeline.data.sources.look import Look, features_of, files_beside, lies_beside
from pipeline.data.sources.parts import Item, Part, Request, SourceListing, pick
from pipeline.data.sources.splits import split_of_word, splits_of_files
from pipeline.data.sources.tables import are_source, look_at_all, names_beside
from pipeline.data.sources.tree import Tree
from pipeline.errors import InputError
from pipeline.redact import printable

SUFFIXES = (".arrow", ".feather")
_STATE, _ABOUT, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_INDICES = ("_indices_files", "_indices_data_files")
_CACHE = "cache-"
_ROWS = 64


@dataclass(frozen=True)
class ArrowPart(Part):
    """Consecutive rows of one file. `names` are the file and the images beside it that its rows name.

    Attributes:
        start, count: number of the first row, and number of rows.
        columns: the columns of images and labels.
        stored: places of its record batches, in a remote file.
    """

    start: int
    count: int
    columns: Columns
    stored: tuple[Stored, ...] = ()

    def read(self, rows: Sequence[int] | None = None) -> Iterator[Item]:
        file = opened(self.uri, self.columns, self.stored)
        if rows is not None and is_list(file.schema.field(self.columns.image).type):
            # A row may hold several images, so all rows before must be read to count them.
            yield from pick(self.read(), rows)
            return
        beside = partial(read_beside, self.root, self.names[0])
        for first, count in [(0, self.count)] if rows is None else [(row, 1) for row in rows]:
            at = self.start + first
            for batch in file.slices(self.uri, at, count):
                for begin in range(0, batch.num_rows, _ROWS):
                    piece = batch.slice(begin, _ROWS)
                    labels = piece.column(self.columns.label) if self.columns.label in file.names else None
                    places = [f"{self.names[0]}/{at + i:06d}" for i in range(piece.num_rows)]
                    images = piece.column(self.columns.image)
                    for items in items_of(images, labels, self.columns.classes, places, beside):
                        yield from items
                    at += piece.num_rows


@dataclass
class _Found:
    """The Arrow files of a folder.

    Attributes:
        data: names of the files to read, in order, each with the split that it was saved as, or "".
        used: JSON files of `datasets` that were read for this.
        features: the features that `datasets` noted, by folder.
        ignored, bad: as in `SourceListing`.
    """

    data: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)


def _find(tree: Tree) -> _Found:
    found, names = _Found(), [name for name in tree.files if name.lower().endswith(SUFFIXES)]
    saved = {posixpath.dirname(name) for name in tree.files if posixpath.basename(name) == _STATE}
    for folder in sorted({posixpath.dirname(name) for name in names} | saved):
        here = [name for name in names if posixpath.dirname(name) == folder]
        about = _read_json(tree, posixpath.join(folder, _ABOUT), found)
        if isinstance(features := about.get("features"), dict):
            found.features[folder] = features
        above = posixpath.join(posixpath.dirname(folder), _SPLITS)
        splits = _read_json(tree, above, found).get("splits") if folder else None
        if isinstance(splits, list) and posixpath.basename(folder) not in splits:
            found.ignored |= dict.fromkeys(here, f"{_SPLITS} does not list its folder as a split")
            continue
        state = _read_json(tree, posixpath.join(folder, _STATE), found) if folder in saved else {}
        if any(state.get(key) for key in _INDICES):
            raise InputError(
                f"{tree.uri(folder) if folder else tree.root}: holds a selection of rows (`_indices_files` in {_STATE}): "
                "call flatten_indices() and save it again"
            )
        if isinstance(state.get("_data_files"), list):
            split = split_of_word(str(state.get("_split") or ""))
            for entry in state["_data_files"]:
                name = posixpath.join(folder, str(entry.get("filename")) if isinstance(entry, dict) else "")
                if name in here:
                    found.data[name] = split
                elif name not in tree.bad:
                    found.bad[name] = f"missing, although {_STATE} lists it"
            rest = "state.json does not list it as a data file"
            found.ignored |= {name: rest for name in here if name not in found.data}
        else:
            for name in here:
                if posixpath.basename(name).startswith(_CACHE):
                    found.ignored[name] = "a cache file of `datasets`"
                else:
                    found.data[name] = ""
    return found


def _read_json(tree: Tree, name: str, found: _Found) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. A damaged file is added to `found.bad`."""
    if name not in tree.files or name in found.bad:
        return {}
    try:
        content = json.loads(storage.read_bytes(tree.uri(name)))
    except OSError as error:
        found.bad[name] = fault_of_file(error, tree.uri(name))
        return {}
    except ValueError as error:
        found.bad[name] = f"damaged: {error}"
        return {}
    found.used.add(name)
    return content if isinstance(content, dict) else {}


def is_arrow(tree: Tree) -> bool:
    """True if Arrow files are the source (see `tables.are_source`), or must be refused."""
    if not any(name.lower().endswith(SUFFIXES) for name in tree.files):
        return False
    try:
        found = _find(tree)
    except InputError:
        return True
    return are_source(tree, list(found.data), partial(_look_at, tree, found))


def list_arrow(tree: Tree, request: Request) -> SourceListing:
    """The Arrow files of a folder that hold images, in parts of about `request.images_per_part` rows.

    Raises:
        InputError: as `columns.choose`; or a dataset was saved as a selection of another one's rows.
    """
    forget_open_files()
    found = _find(tree)
    looks, bad = look_at_all(partial(_look_at, tree, found), found.data)
    choice = choose(looks, request, "Arrow")
    looks = [look for look in looks if look.name in choice.columns]
    batches = {look.name: _batches(tree, look, choice.columns[look.name], bad) for look in looks}
    looks = [look for look in looks if look.name not in bad]
    classes, columns = name_labels(looks, {look.name: choice.columns[look.name] for look in looks})
    # The split is taken from a file's own name and folder first, then from the name that it was saved under.
    whole = {posixpath.join(found.data[name], name): name for name in columns}
    splits = {whole[name]: split for name, split in splits_of_files(whole).items()}
    parts = list[Part]()
    for look in looks:
        name = look.name
        beside = _named_beside(tree, look, columns[name].image, request.images_per_part)
        rows, stored = batches[name]
        for number, start in enumerate(range(0, rows, request.images_per_part)):
            count = min(request.images_per_part, rows - start)
            names = (name, *sorted(beside.get(number, ())))
            here = tuple(one for one in stored if start < one.first + one.rows and one.first < start + count)
            parts.append(ArrowPart(tree.root, names, start, count, columns[name], here, split=splits[name]))
    used = {name for part in parts for name in part.names} | columns.keys() | found.used
    ignored = {**found.ignored, **choice.ignored}
    return SourceListing(
        tuple(parts),
        frozenset(used),
        classes=classes,
        ignored=ignored,
        bad={**found.bad, **bad, **choice.bad},
    )


def _look_at(tree: Tree, found: _Found, name: str) -> Look | str:
    uri = tree.uri(name)
    try:
        schema = schema_of(uri)
    except OSError as error:
        return fault_of_file(error, uri)
    except InputError as error:
        return str(error).removeprefix(f"{uri}: ")

    def read(column: str, step: int) -> Iterator[pa.Array]:
        for batch in walk(uri, printable(name), (column,)):
            for begin in range(0, batch.num_rows, step):
                yield batch.column(column).slice(begin, step)

    features = features_of(schema) or found.features.get(posixpath.dirname(name), {})
    return Look(name, schema, features, read, partial(lies_beside, tree, name))


def _batches(tree: Tree, look: Look, columns: Columns, bad: dict[str, str]) -> tuple[int, list[Stored]]:
    """Number of rows in a file and, in a remote file, their places. Adds a file that can't be read through to `bad`."""
    uri, where, smallest = tree.uri(look.name), printable(look.name), columns.label or columns.image
    try:
        if not storage.is_local(uri) and (stored := stored_batches(uri, where, smallest)):
            return stored[-1].first + stored[-1].rows, stored
        return sum(batch.num_rows for batch in walk(uri, where, (smallest,))), []
    except InputError as error:
        bad[look.name] = str(error).removeprefix(f"{where}: ")
        return 0, []


def _named_beside(tree: Tree, look: Look, image: str, per_part: int) -> dict[int, set[str]]:
    """The image files beside an Arrow file that its rows name, by the number of the part."""
    kind, named, at = look.type_of(image), dict[int, set[str]](), 0
    if one_form(kind) == "bytes" or not files_beside(tree):
        return named
    for array in look.read(image, _ROWS):
        if pa.types.is_struct(kind) and not array.flatten()[kind.get_field_index("bytes")].null_count:
            at += len(array)
            continue
        for names in names_beside(tree, look.name, array):
            named.setdefault(at // per_part, set()).update(names)
            at += 1
    return named
