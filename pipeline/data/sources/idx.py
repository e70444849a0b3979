"""Reads IDX files, the format in which MNIST is published."""

import gzip
import posixpath
import re
import zlib
from collections.abc import Iterable

from pipeline.data.labels import label_text, name_classes
from pipeline.data.sources.fetch import refusing
from pipeline.data.sources.label_columns import NO_LABELS
from pipeline.data.sources.loose import is_image_name, outweigh_images
from pipeline.data.sources.parts import Part, Request, SourceListing
from pipeline.data.sources.records import GZIP, Records, cut_array
from pipeline.data.sources.splits import splits_of_files
from pipeline.data.sources.tree import Tree, with_beside
from pipeline.errors import InputError
from pipeline.redact import one_line, printable
from pipeline.stretches import open_file, read_stretch

_IMAGES, _LABELS = 2051, 2049  # magic numbers of 8-bit values in three dimensions and in one
_GZIPPED = b"\x1f\x8b"
_SLACK, _MOST_AHEAD = 2**12, 2**20  # bytes to fetch at once from a gzipped file
_NAME, _LABELS_NAME = re.compile(r"images[-._]idx3"), re.compile(r"labels[-._]idx")


def is_idx(tree: Tree) -> bool:
    """True if files named like MNIST's images, gzipped or not, are no smaller than the image files beside them."""
    return outweigh_images(tree, list(filter(_is_images, tree.files)))


def is_idx_name(name: str) -> bool:
    """True if a file is named like MNIST's images or labels."""
    return _is_images(name) or _is_labels(name)


def _is_images(name: str) -> bool:
    return _NAME.search(posixpath.basename(name).lower()) is not None and not is_image_name(name)


def _is_labels(name: str) -> bool:
    return _LABELS_NAME.search(posixpath.basename(name).lower()) is not None


def list_idx(tree: Tree, request: Request) -> SourceListing:
    """All files of images, each with its file of labels if there is one.

    Raises:
        InputError: a file is no IDX file, damaged or cut short, or a file of labels does not fit its images.
    """
    names, ignored = _plain_first(filter(_is_images, tree.files))
    wanted = {_labels_key(name) for name in names}
    tree = with_beside(tree, lambda name: _key(name) in wanted)
    splits, parts, used, found = splits_of_files(names), list[Part](), set[str](), set[str]()
    shapes = set[tuple[int, int]]()
    for name in names:
        records, height, width = _open_images(tree, name)
        shapes.add((height, width))
        labels_name = _labels_of(tree, name)
        texts = list[tuple[str | None, str]]([(None, "")] * records.count)
        if labels_name:
            used.add(labels_name)
            values = _read_labels(tree, labels_name, name, records.count)
            if request.label_column != NO_LABELS:
                known = [label_text(value) for value in range(256)]  # one object for all equal labels
                texts = [(known[value], "") for value in values]
                found |= {text for text, _ in texts if text is not None}
        used.add(name)
        if not records.count:
            ignored[name] = "holds no images"
        parts += cut_array(
            tree.root, name, records, (height, width, 1), False, texts, request.images_per_part, splits[name]
        )
    labels = list(filter(_is_labels, tree.files))
    copies = _plain_first(labels)[1]
    for name in labels:
        if name not in used:
            ignored[name] = copies.get(name, "labels without a file of images")
    sides = {side for shape in shapes for side in shape}
    size = sides.pop() if len(sides) == 1 else 0
    return SourceListing(
        tuple(parts), frozenset(used - ignored.keys()), size, 1, name_classes(found), ignored
    )


def _plain_first(names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The names without gzipped copies of files that are also there unpacked; and those copies, with the reason."""
    found, copies = dict[str, str](), dict[str, str]()
    for name in sorted(names, key=lambda name: (name.lower().endswith(".gz"), name)):
        plain = name[:-3] if name.lower().endswith(".gz") else name
        if plain in found:
            copies[name] = f"packed copy of {printable(posixpath.basename(found[plain]))}"
        else:
            found[plain] = name
    return sorted(found.values()), copies


def _key(name: str) -> str:
    """A name without the differences that may occur between a file of images and its file of labels."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.lower().removesuffix(".gz").replace(".", "-").replace("_", "-"))


def _labels_key(images: str) -> str:
    """As `_key`, for the file of labels that belongs to a file of images."""
    folder, base = posixpath.split(_key(images))
    before, _, after = base.rpartition("images-idx3")
    return posixpath.join(folder, f"{before}labels-idx1{after}")


def _labels_of(tree: Tree, images: str) -> str:
    """The file of labels beside a file of images, by its name; "" for none.

    Raises:
        InputError: the file is there but can't be read.
    """
    wanted = _labels_key(images)
    for name, reason in tree.bad.items():
        if _key(name) == wanted:
            raise InputError(f"{tree.uri(name)}: {reason}: this file holds labels")
    return next(iter(_plain_first(name for name in tree.files if _key(name) == wanted)[0]), "")


def _open_images(tree: Tree, name: str) -> tuple[Records, int, int]:
    """The images in a file, their height and their width in pixels."""
    uri, file = tree.uri(name), tree.files[name]
    with refusing(uri):
        packed = tree.head(name, 2) == _GZIPPED
    head = _content(uri, packed, 16)
    magic = int.from_bytes(head[:4], "big")
    if len(head) < 16 or magic != _IMAGES:
        raise InputError(
            f"{uri}: not an IDX file of 8-bit images "
            f"({'cut short' if len(head) < 16 else f'it begins with {magic}, not {_IMAGES}'})"
        )
    count, height, width = (int.from_bytes(head[at : at + 4], "big") for at in (4, 8, 12))
    if not height or not width:
        raise InputError(f"{uri}: its images have {height}x{width} pixels")
    records = Records(16, height * width, count, GZIP if packed else "", file.version)
    records.check(uri, file.size)
    return records, height, width


def _read_labels(tree: Tree, name: str, images: str, count: int) -> bytes:
    uri = tree.uri(name)
    with refusing(uri):
        packed = tree.head(name, 2) == _GZIPPED
    data = _content(uri, packed, 8 + count + 1)
    magic, said = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big")
    if len(data) < 8 or magic != _LABELS:
        raise InputError(
            f"{uri}: not an IDX file of 8-bit labels "
            f"({'cut short' if len(data) < 8 else f'it begins with {magic}, not {_LABELS}'})"
        )
    if said != count:
        raise InputError(
            f"{uri}: holds {said} labels for the {count} images of {printable(posixpath.basename(images))}"
        )
    if len(data) != 8 + count:
        raise InputError(f"{uri}: holds {len(data) - 8} labels or more, {count} expected: download it again")
    return data[8:]


def _content(uri: str, packed: bool, most: int) -> bytes:
    """The first `most` bytes of a file's content, unpacked if it is gzipped."""
    try:
        with refusing(uri):
            if not packed:
                return read_stretch(uri, 0, most)
            with open_file(uri, ahead=min(most + _SLACK, _MOST_AHEAD)) as file, gzip.open(file) as content:
                return content.read(most)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{uri}: damaged, download it again: {one_line(error)}") from None
