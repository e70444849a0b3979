"""Reads the binary files of CIFAR-10 and CIFAR-100."""

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
    """A kind of CIFAR file.

    Attributes:
        labels: bytes of labels before the pixels of each image; the last byte is the class.
        classes: number of classes.
        names: name of the file with the class names.
    """

    labels: int
    classes: int
    names: str

    @property
    def size(self) -> int:
        return self.labels + _PIXELS


_OTHERS = {
    "batches.meta.txt": "class names without a data file beside them",
    "fine_label_names.txt": "class names without a data file beside them",
    "coarse_label_names.txt": "names of the coarse classes; the fine classes are used",
    "batches.meta": "class names in a pickle, which is never opened",
    "meta": "class names in a pickle, which is never opened",
}
_CIFAR_10 = _Kind(1, 10, "batches.meta.txt")
_CIFAR_100 = _Kind(2, 100, "fine_label_names.txt")


@dataclass(frozen=True)
class CifarPart(Part):
    """Consecutive images of one file.

    Attributes:
        records: all images of the file, each after its labels.
        start, count: number of the first image, and number of images.
        classes: names of the classes; empty = labels are not wanted.
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
    """True if files have the names of CIFAR's binary files and are together no smaller than the image files beside them.

    A train.bin or test.bin also needs a matching length, or a file of class names beside it.
    """
    return outweigh_images(tree, [name for name in tree.files if _kind(tree, name)])


def is_cifar_name(base: str) -> bool:
    """True if a file may be a CIFAR file, by its name without folders."""
    return bool(_TEN.fullmatch(base)) or base in _HUNDRED


def _kind(tree: Tree, name: str) -> _Kind | None:
    folder, base = posixpath.split(name)
    if _TEN.fullmatch(base):
        return _CIFAR_10
    size, named = tree.files[name].size, posixpath.join(folder, _CIFAR_100.names) in tree.files
    return _CIFAR_100 if base in _HUNDRED and (named or (size and not size % _CIFAR_100.size)) else None


def list_cifar(tree: Tree, request: Request) -> SourceListing:
    """All binary files, with the class names beside them.

    Raises:
        InputError: a file is cut short or is no CIFAR file, or the class names of several folders differ.
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
            raise InputError(
                f"{tree.uri(names)}: its class names differ from another folder's: give one of the two folders"
            )
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
        raise InputError(f"{tree.uri(name)}: {tree.bad[name]}: this file names the classes")
    if name not in tree.files:
        return tuple(map(str, range(kind.classes)))
    with refusing(tree.uri(name)):
        text = storage.read_bytes(tree.uri(name)).decode("utf-8-sig", "backslashreplace")
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names or len(set(names)) < len(names):
        raise InputError(f"{tree.uri(name)}: must name each class once, one name a line")
    return names


def _records(tree: Tree, name: str, kind: _Kind, classes: int) -> Records:
    size, uri = tree.files[name].size, tree.uri(name)
    if not size or size % kind.size:
        raise InputError(
            f"{uri}: cut short, or not a CIFAR-{kind.classes} file: {size} bytes are no multiple of {kind.size}"
        )
    with refusing(uri):
        label = tree.head(name, kind.labels)[-1]
    if label >= classes:
        raise InputError(
            f"{uri}: not a CIFAR-{kind.classes} file: its first image has label {label}, with {classes} classes"
        )
    return Records(0, kind.size, size // kind.size, version=tree.files[name].version)
