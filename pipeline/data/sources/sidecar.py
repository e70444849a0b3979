"""Reads labels of image files from a file beside them: metadata.* of Hugging Face, or dataset.json of EDM.

If such a file labels images, its labels replace folder names, in its folder and below. The nearest file counts. An
image that the file does not name is not used, as in `datasets`.
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
Named = tuple[str | None, str]  # a label, and the reason why it can't be a class or ""


@dataclass(frozen=True)
class Sidecar:
    """One file with labels.

    Attributes:
        name: name below the root.
        named: the images that it names, with their labels.
        labels: True if it says anything about labels.
        all_named: True if images that it does not name are left out.
        beside: other files that it names, such as masks, with the column. They are not images of their own.
        classes: names of its labels in order, if it has them.
        chosen: True if it has the requested column of images.
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
    """The labels from all such files of a tree or archive.

    Attributes:
        of: label of each image that they label.
        used, ignored, bad: as in `SourceListing`.
        classes: names of the labels in order, if the files have them.
    """

    of: dict[str, str | None]
    used: frozenset[str]
    ignored: dict[str, str]
    bad: dict[str, str]
    classes: tuple[str, ...]


def is_sidecar(name: str) -> bool:
    return posixpath.basename(name) in (*TABLES, EDM)


def read_labels(images: Collection[str], given: Given) -> Labels:
    """Reads the labels of images that lie in one tree or archive.

    Raises:
        InputError: a file with labels can't be read, two files in one folder hold labels, or no file has the
            requested column.
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
            raise InputError(f"{flag} {column}: {where} has no {' or '.join(TABLES)} with this column")
    of, bad, nearest = dict[str, str | None](), dict[str, str](), _by_folder(labelling, where)
    # The nearest file comes last and overrides the others.
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
                    f"listed in {sidecar.base}, but {'not an image' if name in given.names else 'missing'}"
                )
    for sidecar in sidecars:
        beside = {name: f"{sidecar.base} lists it as {column}" for name, column in sidecar.beside.items()}
        ignored |= {name: reason for name, reason in beside.items() if name in images and name not in of}
    for name in images if nearest else ():
        governing = None if name in of or name in ignored else _governing(name, nearest)
        if governing is not None and governing.all_named:
            ignored[name] = f"not listed in {governing.base}"
        elif governing is not None:
            of[name] = None
    classes = tuple(dict.fromkeys(name for sidecar in labelling for name in sidecar.classes))
    return Labels(of, frozenset(s.name for s in labelling), ignored, bad, classes)


def _read_all(given: Given) -> tuple[list[Sidecar], dict[str, str]]:
    """All files with labels, and the reason for each such file that holds none."""
    request, where = given.request, given.where
    for name, reason in given.unreadable.items():
        if is_sidecar(name) and reason != HIDDEN:
            raise InputError(f"{where}/{printable(name)}: {reason}: this file may hold labels")
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
    """Parses one file. Raises NoMetadata if it is something else, InputError if it is damaged."""
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
            named[path] = None, f"listed twice in {base}, with different labels"
    return named


def _finder(names: Collection[str]) -> Callable[[str], str]:
    """Returns a function from a path in a table to the name of the file that it means; other paths are normalised.

    This allows for Windows separators, and for macOS, which writes accents in decomposed form.
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
    """The same labels with names below the root, instead of names below the file's own folder."""
    named = dict[str, Named]()
    for path, label in sidecar.named.items():
        name = find(posixpath.join(sidecar.folder, path))
        if named.setdefault(name, label) != label:
            named[name] = None, f"listed twice in {sidecar.base}, with different labels"
    beside = {find(posixpath.join(sidecar.folder, path)): column for path, column in sidecar.beside.items()}
    return replace(sidecar, named=named, beside=beside)
