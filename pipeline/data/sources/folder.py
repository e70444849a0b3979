"""Reads trees of image files. Classes are named by folders, or by metadata beside the images."""

import hashlib
import itertools
import math
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline import storage
from pipeline.data.images import sniff
from pipeline.data.labels import name_classes
from pipeline.data.sources.fetch import THREADS, fault_of_file, in_order, read_file
from pipeline.data.sources.label_columns import NO_LABELS
from pipeline.data.sources.loose import is_image_name
from pipeline.data.sources.parts import Given, Item, Part, Request, SourceListing
from pipeline.data.sources.sidecar import is_sidecar, read_labels
from pipeline.data.sources.splits import BESIDE, is_most, split_folders, split_of_word, splits_in_classes
from pipeline.data.sources.tree import Tree
from pipeline.redact import printable

NO_IMAGE = "not an image"
_HEAD_BYTES = 64


@dataclass(frozen=True)
class FolderPart(Part):
    """Some image files of a tree.

    Attributes:
        labels: label of each file.
        bucket: first binary digits of the hashes of their names.
    """

    labels: tuple[str | None, ...]
    bucket: str = ""

    @property
    def slot(self) -> str:
        return f"{self.split}|{self.bucket}"

    def read(self, rows: Sequence[int] | None = None) -> Iterator[Item]:
        def item(place: int) -> Item:
            name = self.names[place]
            data, reason = read_file(storage.join(self.root, name))
            return Item(printable(name), data, self.labels[place], reason)

        yield from in_order(item, range(len(self.names)) if rows is None else rows, self.root)


@dataclass(frozen=True)
class Arranged:
    """The images of a tree or an archive, with their splits and labels.

    Attributes:
        splits, labels: split and label of each image in use.
        used: other files that were read for labels.
        ignored, bad: as in `SourceListing`.
        named: True if labels come from metadata rather than folders.
        classes: names of the labels in order, if metadata gives them.
    """

    splits: dict[str, str]
    labels: dict[str, str | None]
    used: frozenset[str]
    ignored: dict[str, str]
    bad: dict[str, str]
    named: bool
    classes: tuple[str, ...]


def is_folder(tree: Tree) -> bool:
    """True if there are images, judged by names or by first bytes."""
    if any(map(is_image_name, tree.files)):
        return True
    names = list(tree.files)
    batches = (names[i : i + 8 * THREADS] for i in range(0, len(names), 8 * THREADS))
    return any(any(_are_images(tree, batch)) for batch in batches)


def list_folder(tree: Tree, request: Request) -> SourceListing:
    """All images of a tree, spread over parts by hashes of their names, so that every part has images of all classes.

    Raises:
        InputError: a file with labels can't be read, or contradicts another.
    """
    others = [name for name in tree.files if not is_image_name(name)]
    found = dict(zip(others, _are_images(tree, others), strict=True))
    images = [name for name in tree.files if found.get(name, True) is True]
    no_images = dict.fromkeys((name for name in others if found[name] is False), NO_IMAGE)
    given = Given(
        tree.files,
        {**tree.ignored, **tree.bad},
        lambda name: read_file(tree.uri(name)),
        request,
        printable(tree.root),
    )
    arranged = arrange(images, given)
    parts = tuple(
        FolderPart(tree.root, names, tuple(arranged.labels[name] for name in names), bits, split=split)
        for split, bits, names in buckets(arranged.splits, request.images_per_part)
    )
    used = arranged.used.union(arranged.labels)
    left_out = no_images | arranged.ignored
    ignored = {name: why for name, why in left_out.items() if name not in used and name not in arranged.bad}
    return SourceListing(parts, used, classes=classes_of([arranged]), ignored=ignored, bad=arranged.bad)


def _are_images(tree: Tree, names: Iterable[str]) -> Iterator[bool | None]:
    """For each file, True if it begins like an image; None if it can't be read (`account_for` finds the reason)."""

    def is_image(name: str) -> bool | None:
        try:
            return not is_sidecar(name) and sniff(tree.head(name, _HEAD_BYTES)) is not None
        except OSError as error:
            fault_of_file(error, tree.uri(name))
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(is_image, names)


def arrange(
    images: Iterable[str], given: Given, label_of: Callable[[str], str | None] | None = None
) -> Arranged:
    """Finds the split and the label of each image.

    Args:
        images: names of the images.
        given: the tree or archive that they lie in.
        label_of: label of an image outside any split, by its name; by default its folder.

    Raises:
        InputError: as `read_labels`.
    """
    images = dict.fromkeys(images)
    level, found = split_folders(images)
    doubled, depth = _doubled(images, level, found), 0 if found else splits_in_classes(images)
    ignored, splits, labels = dict[str, str](), dict[str, str](), dict[str, str | None]()
    known = dict[str, str]()  # one object for all equal labels, so that pickle stores it once
    beside = BESIDE.format(", ".join(sorted(found)) or "of each class")
    for name in images:
        if found:
            first, _, rest = name[len(level) :].partition("/")
            if first not in found or not name.startswith(level):
                ignored[name] = beside
                continue
            splits[name], label = found[first], folder_label(rest.removeprefix(doubled.get(first, "")))
        elif depth:
            *folders, base = name.split("/")
            if not (split := split_of_word(folders.pop(depth)) if len(folders) > depth else ""):
                ignored[name] = beside
                continue
            splits[name], label = split, folder_label("/".join([*folders, base]))
        else:
            splits[name], label = "", label_of(name) if label_of else folder_label(name)
        labels[name] = label if label is None else known.setdefault(label, label)
    said = read_labels(splits, given)
    for name, label in said.of.items():
        labels[name] = label if label is None else known.setdefault(label, label)
    left_out = said.ignored.keys() | said.bad.keys()
    take = given.request.label_column != NO_LABELS
    return Arranged(
        {name: split for name, split in splits.items() if name not in left_out},
        {name: label if take else None for name, label in labels.items() if name not in left_out},
        said.used,
        ignored | said.ignored,
        {name: reason for name, reason in said.bad.items() if name not in ignored},
        bool(said.of),
        said.classes if take else (),
    )


def _doubled(images: Iterable[str], level: str, found: Mapping[str, str]) -> dict[str, str]:
    """A folder inside a split's folder that holds most of it and has the same name: train/train/cat/1.png."""
    inside = dict[str, Counter[str]]()
    for name in images:
        first, _, rest = name.removeprefix(level).partition("/")
        inside.setdefault(first, Counter())[rest[: rest.find("/") + 1]] += 1
    return {
        first: folder
        for first, counts in inside.items()
        if first in found
        for folder in counts.keys() - {""}
        if counts.keys() <= {folder, ""} and is_most(counts[folder], counts.total())
        if split_of_word(folder.rstrip("/")) == found[first]
    }


def folder_label(name: str) -> str | None:
    """The folder that a file lies in, as a label; None for none."""
    return printable(posixpath.dirname(name)) or None


def classes_of(found: Iterable[Arranged]) -> tuple[str, ...]:
    """The classes of all images: folders sorted by name, numbers in numeric order."""
    found = list(found)
    labels = {label for one in found for label in one.labels.values() if label is not None}
    if not any(one.named for one in found):
        return tuple(sorted(labels))
    classes = tuple(dict.fromkeys(name for one in found for name in one.classes))
    return (*classes, *sorted(labels.difference(classes))) if classes else name_classes(labels)


def buckets(splits: Mapping[str, str], images_per_part: int) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Cuts names into parts of one split each, by hashes of the names, so that a new file changes only one part.

    Returns:
        for each part: split, first binary digits of the hashes, and names.
    """
    hashed = sorted((split, _hash(name), name) for name, split in splits.items())
    for split, some in itertools.groupby(hashed, key=lambda entry: entry[0]):
        mine = [(digits, name) for _, digits, name in some]
        depth = max(0, math.ceil(math.log2(len(mine) / images_per_part)))
        for bits, names in itertools.groupby(mine, key=lambda entry: entry[0][:depth]):
            yield split, bits, tuple(name for _, name in names)


def _hash(name: str) -> str:
    """SHA-256 of a name, as its first 64 binary digits."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return f"{int.from_bytes(digest[:8], 'big'):064b}"
