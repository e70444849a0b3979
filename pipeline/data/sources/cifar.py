"""CIFAR-10's and CIFAR-100's binary files."""

import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.data.labels import class_text
from pipeline.data.sources.fetch import refusing
from pipeline.data.sources.label_columns import NO_LABELS
from pipeline.data.sources.loose import outweigh_images
from pipeline.data.sources.parts import Item, Part, Request, SourceListing
from pipeline.data.sources.records import Records, to_pixels
from pipeline.data.sources.tree import Tree, with_beside
from pipeline.errors import InputError
from pipeline.redact import printable

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_TEN = re.compile(r"data_batch_\d+\.bin|test_batch\.bin")
_HUNDRED = ("train.bin", "test.bin")


@dataclass(frozen=True)
class _Kind:
    """Of files.

    Attributes:
        labels: bytes before the pixels; the last of them is the class.
        names: the file that names the classes.
    """

    labels: int
    classes: int
    names: str

    @property
    def size(self) -> int:
        return self.labels + _PIXELS


_OTHERS = {
    "batches.meta.txt": "names of classes that no file beside it has",
    "fine_label_names.txt": "names of classes that no file beside it has",
    "coarse_label_names.txt": "names of the coarse classes: the fine ones are read",
    "batches.meta": "names of the classes as a pickle, which is never opened",
    "meta": "names of the classes as a pickle, which is never opened",
}
_CIFAR_10 = _Kind(1, 10, "batches.meta.txt")
_CIFAR_100 = _Kind(2, 100, "fine_label_names.txt")


@dataclass(frozen=True)
class CifarPart(Part):
    """Images that follow each other in a file.

    Attributes:
        records: all images of the file, each behind its labels.
        classes: names of the classes; none = labels are not wanted.
    """

    records: Records
    start: int
    count: int
    classes: tuple[str, ...]

    def read(self, rows: Sequence[int] | None = None) -> Iterator[Item]:
        places = range(self.count) if rows is None else rows
        before = self.records.size - _PIXELS
        records = self.records.read(self.uri, [self.start + place for place in places])
        for place, record in zip(places, records, strict=True):
            label, reason = class_text(record[before - 1], self.classes) if self.classes else (None, "")
            path = f"{printable(self.names[0])}/{self.start + place:05d}.png"
            yield Item(path, b"" if reason else to_pixels(record[before:], _SHAPE, True), label, reason)


def is_cifar(tree: Tree) -> bool:
    """Whether there are CIFAR's binary files, by their names, no less than the image files beside them.

    A train.bin needs their length, or the names of the classes beside it.
    """
    return outweigh_images(tree, [name for name in tree.files if _kind(tree, name)])


def is_cifar_name(base: str) -> bool:
    """Whether a file may be one of CIFAR's, by its name without folders."""
    return bool(_TEN.fullmatch(base)) or base in _HUNDRED


def _kind(tree: Tree, name: str) -> _Kind | None:
    folder, base = posixpath.split(name)
    if _TEN.fullmatch(base):
        return _CIFAR_10
    size, named = tree.files[name].size, posixpath.join(folder, _CIFAR_100.names) in tree.files
    return _CIFAR_100 if base in _HUNDRED and (named or (size and not size % _CIFAR_100.size)) else None


def list_cifar(tree: Tree, request: Request) -> SourceListing:
    """All binary files, with the names of the classes that lie beside them.

    Raises:
        InputError: a file is cut short or something else; the classes of several files differ.
    """
    tree = with_beside(tree, lambda name: posixpath.basename(name) in (_CIFAR_10.names, _CIFAR_100.names))
    kinds = {name: kind for name in tree.files if (kind := _kind(tree, name))}
    if len(set(kinds.values())) > 1:
        raise InputError(f"{tree.root}: holds CIFAR-10 and CIFAR-100: give the folder of one of them")
    parts, used, found = list[Part](), set(kinds), dict[str, tuple[str, ...]]()
    for name, kind in kinds.items():
        folder = posixpath.dirname(name)
        names = posixpath.join(folder, kind.names)
        if folder not in found:
            found[folder] = _class_names(tree, names, kind)
            used |= {names} & tree.files.keys()
        if found[folder] != next(iter(found.values())):
            raise InputError(f"{tree.uri(names)}: names other classes than another folder: give one of them")
        records = _records(tree, name, kind, len(found[folder]))
        classes = () if request.label_column == NO_LABELS else found[folder]
        split = "test" if "test" in posixpath.basename(name) else "train"
        for start in range(0, records.count, request.images_per_part):
            count = min(request.images_per_part, records.count - start)
            parts.append(CifarPart(tree.root, (name,), records, start, count, classes, split=split))
    classes = next(iter(found.values()), ()) if request.label_column != NO_LABELS else ()
    others = {name: why for name in tree.files if (why := _OTHERS.get(posixpath.basename(name)))}
    ignored = {name: why for name, why in others.items() if name not in used}
    return SourceListing(tuple(parts), frozenset(used), 32, 3, classes, ignored)


def _class_names(tree: Tree, name: str, kind: _Kind) -> tuple[str, ...]:
    if name in tree.bad:
        raise InputError(f"{tree.uri(name)}: {tree.bad[name]}: the classes are named in it")
    if name not in tree.files:
        return tuple(map(str, range(kind.classes)))
    with refusing(tree.uri(name)):
        text = storage.read_bytes(tree.uri(name)).decode("utf-8-sig", "backslashreplace")
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names or len(set(names)) < len(names):
        raise InputError(f"{tree.uri(name)}: should name each class once, on a line of its own")
    return names


def _records(tree: Tree, name: str, kind: _Kind, classes: int) -> Records:
    size, uri = tree.files[name].size, tree.uri(name)
    if not size or size % kind.size:
        raise InputError(
            f"{uri}: cut short, or not CIFAR-{kind.classes}'s: {size} bytes are not records of {kind.size}"
        )
    with refusing(uri):
        label = tree.head(name, kind.labels)[-1]
    if label >= classes:
        raise InputError(
            f"{uri}: not CIFAR-{kind.classes}'s: its first image has the label {label} of {classes} classes"
        )
    return Records(0, kind.size, size // kind.size, version=tree.files[name].version)
