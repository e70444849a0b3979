"""Labels of image files that stand in a file beside them: Hugging Face's metadata.*, and EDM's dataset.json.

Where such a file labels images, its labels take the place of folder names, in its folder and below; the nearest file
counts. An image there that it does not name is not used, as `datasets` does it.
"""

import posixpath
import unicodedata
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import storage
from pipeline.data.labels import class_text
from pipeline.data.sources.label_columns import NO_LABELS
from pipeline.data.sources.parts import Given, Request
from pipeline.data.sources.sidecar_files import EDM, FILE_NAME, TABLES, NoMetadata, read_edm, read_table
from pipeline.data.sources.tree import HIDDEN
from pipeline.errors import InputError
from pipeline.redact import printable

_LABEL = "label"
Named = tuple[str | None, str]  # a label, and the reason why that can be no class


@dataclass(frozen=True)
class Sidecar:
    """One such file.

    Attributes:
        named: the images that it names.
        labels: whether it says anything of labels.
        all_named: whether the images that it does not name are to be left out.
        beside: other files that it names, with the column; they belong to images and are none of their own.
        classes: names of its labels in order, where it has them.
        chosen: whether it has the column of images that was asked for.
    """

    name: str
    named: dict[str, Named]
    labels: bool
    all_named: bool = True
    beside: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    chosen: bool = False

    @property
    def base(self) -> str:
        return posixpath.basename(self.name)

    @property
    def folder(self) -> str:
        return posixpath.dirname(self.name)


@dataclass(frozen=True)
class Labels:
    """What all such files say.

    Attributes:
        of: label of each image that they label.
        used, ignored, bad: as in `SourceListing`.
        classes: names of their labels in order, where they have them.
    """

    of: dict[str, str | None]
    used: frozenset[str]
    ignored: dict[str, str]
    bad: dict[str, str]
    classes: tuple[str, ...]


def is_sidecar(name: str) -> bool:
    return posixpath.basename(name) in (*TABLES, EDM)


def read_labels(images: Collection[str], given: Given) -> Labels:
    """Reads the labels of images, all of which lie in one tree or in one archive.

    Raises:
        InputError: such a file can't be read; two in one folder hold labels; no file has the column that was asked for.
    """
    request, where = given.request, given.where
    sidecars, ignored = _read_all(given)
    labelling = [sidecar for sidecar in sidecars if sidecar.labels]
    wanted = request.label_column if request.label_column != NO_LABELS else ""
    for flag, column, there in (
        ("--label-column", wanted, any(sidecar.base in TABLES for sidecar in labelling)),
        ("--image-column", request.image_column, any(sidecar.chosen for sidecar in sidecars)),
    ):
        if column and not there:
            raise InputError(f"{flag} {column}: {where} has no {' or '.join(TABLES)} with such a column")
    of, bad, nearest = dict[str, str | None](), dict[str, str](), _by_folder(labelling, where)
    # The nearest last: it counts.
    for sidecar in sorted(
        sidecars, key=lambda sidecar: len(sidecar.folder.split("/") if sidecar.folder else ())
    ):
        for name, (label, reason) in sidecar.named.items():
            if name in images:
                if sidecar.labels:
                    of[name] = label
                    bad.pop(name, None)
                if reason and sidecar.labels:
                    bad[name] = reason
            elif name not in given.unreadable:
                bad[name] = (
                    f"named in {sidecar.base} and {'no image' if name in given.names else 'not there'}"
                )
    for sidecar in sidecars:
        beside = {name: f"{sidecar.base} names it as {column}" for name, column in sidecar.beside.items()}
        ignored |= {name: reason for name, reason in beside.items() if name in images and name not in of}
    for name in images if nearest else ():
        governing = None if name in of or name in ignored else _governing(name, nearest)
        if governing is not None and governing.all_named:
            ignored[name] = f"not named in {governing.base}"
        elif governing is not None:
            of[name] = None
    classes = tuple(dict.fromkeys(name for sidecar in labelling for name in sidecar.classes))
    return Labels(of, frozenset(s.name for s in labelling), ignored, bad, classes)


def _read_all(given: Given) -> tuple[list[Sidecar], dict[str, str]]:
    """All such files, and those that hold no labels with the reason."""
    request, where = given.request, given.where
    for name, reason in given.unreadable.items():
        if is_sidecar(name) and reason != HIDDEN:
            raise InputError(f"{where}/{printable(name)}: {reason}: there may be labels in it")
    found, ignored = list[Sidecar](), dict[str, str]()
    there = list(filter(is_sidecar, given.names))
    find = _finder(given.names) if there else str
    for name in there:
        try:
            sidecar = _parse(name, given.content(name), request, storage.join(where, printable(name)))
        except NoMetadata as no:
            ignored |= {name: str(no)} if str(no) else {}
            continue
        found.append(_resolved(sidecar, find))
        if not sidecar.labels:
            column = request.label_column or _LABEL
            ignored[name] = "--label-column none" if column == NO_LABELS else f"has no column {column}"
    return found, ignored


def _by_folder(labelling: list[Sidecar], where: str) -> dict[str, Sidecar]:
    found = dict[str, Sidecar]()
    for sidecar in labelling:
        if sidecar.folder in found:
            both = f"{found[sidecar.folder].base} and {sidecar.base}"
            raise InputError(f"{where}/{sidecar.folder}: both {both} hold labels: keep one of them")
        found[sidecar.folder] = sidecar
    return found


def _governing(name: str, by_folder: dict[str, Sidecar]) -> Sidecar | None:
    folder = name
    while folder:
        folder = posixpath.dirname(folder)
        if folder in by_folder:
            return by_folder[folder]
    return None


def _parse(name: str, data: bytes, request: Request, where: str) -> Sidecar:
    """Raises NoMetadata for a file that is something else, InputError for one that is damaged."""
    base = posixpath.basename(name)
    if base == EDM:
        pairs = read_edm(data, where)
        none = pairs is None or request.label_column == NO_LABELS
        named = {} if pairs is None else _named(pairs, (), base)
        return Sidecar(name, dict.fromkeys(named, (None, "")) if none else named, True, pairs is not None)
    label = request.label_column or _LABEL
    table = read_table(base, data, request.image_column, label, where)
    found = [column for column in table.values if column != label]
    chosen = [column for column in (request.image_column, FILE_NAME) if column in found][:1] or found
    labels = table.values.get(label)
    rows = [
        (path, labels[place] if labels else None)
        for column in chosen
        for place, path in enumerate(table.values[column])
        if path
    ]
    beside = {path: column for column in found if column not in chosen for path in table.values[column]}
    beside.pop(None, None)
    named, asked_for = _named(rows, table.classes, base), request.image_column in found
    return Sidecar(name, named, labels is not None, True, beside, table.classes, asked_for)


def _named(rows: Iterable[tuple[str, Any]], classes: tuple[str, ...], base: str) -> dict[str, Named]:
    named = dict[str, Named]()
    for path, value in rows:
        label = class_text(value, classes)
        if named.setdefault(path, label) != label:
            named[path] = None, f"named twice in {base}, with different labels"
    return named


def _finder(names: Collection[str]) -> Callable[[str], str]:
    """Returns a function from a path to the file that it means, or else to itself.

    Windows separates folders otherwise, and macOS writes accents otherwise than those who write tables.
    """
    composed = {unicodedata.normalize("NFC", name): name for name in names}

    def find(path: str) -> str:
        for form in (path, path.replace("\\", "/")):
            plain = posixpath.normpath(form)
            if plain in names:
                return plain
            if found := composed.get(unicodedata.normalize("NFC", plain)):
                return found
        return posixpath.normpath(path)

    return find


def _resolved(sidecar: Sidecar, find: Callable[[str], str]) -> Sidecar:
    """With names below the root, in place of those below its own folder."""
    named = dict[str, Named]()
    for path, label in sidecar.named.items():
        name = find(posixpath.join(sidecar.folder, path))
        if named.setdefault(name, label) != label:
            named[name] = None, f"named twice in {sidecar.base}, with different labels"
    beside = {find(posixpath.join(sidecar.folder, path)): column for path, column in sidecar.beside.items()}
    return replace(sidecar, named=named, beside=beside)
