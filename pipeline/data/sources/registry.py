"""The sources that images are read from, by name: digits, idx, folder, webdataset, huggingface.

A source is cut into parts, small descriptions that any node can read alone, in an order that does not depend
on the machine.
"""

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from pipeline import storage
from pipeline.cluster.pool import ActorPool
from pipeline.data.images import encode_png
from pipeline.data.sources.folder import IMAGE_FOLDER_TABLE, list_folder, read_folder
from pipeline.data.sources.idx import is_idx, list_idx, read_idx
from pipeline.data.sources.parquet import list_parquet, read_parquet
from pipeline.data.sources.parts import IMAGE_SUFFIXES, Item, Part, Source, SourceListing
from pipeline.data.sources.tars import list_tars, read_tar, split_tar
from pipeline.errors import InputError

MOST_UNNAMED_CLASSES = 100_000


def list_source(source: Source, uri: str, images_per_part: int) -> SourceListing:
    """Cuts a source into parts of about `images_per_part` images.

    Raises:
        InputError: nothing of that kind is there.
    """
    if source == "digits":
        return SourceListing((Part("digits"),), 8, 1, tuple(map(str, range(10))))
    if not uri:
        raise InputError(f"--source {source} needs --input")
    uri = storage.absolute(uri)
    listers = {
        "idx": list_idx,
        "folder": list_folder,
        "webdataset": list_tars,
        "huggingface": list_parquet,
    }
    return listers[source](uri, images_per_part)


def find_source(uri: str) -> Source:
    """What kind of source a folder is, by the names of its files.

    Raises:
        InputError: it is empty, or holds nothing that could be read.
    """
    names = [posixpath.basename(file).lower() for file in storage.list_files(uri)]
    if not names:
        raise InputError(f"--data {uri}: is empty: write shards with jobs/prepare.py first")
    suffixes = {posixpath.splitext(name)[1] for name in names if name != IMAGE_FOLDER_TABLE}
    if ".parquet" in suffixes:
        return "huggingface"
    if ".tar" in suffixes:
        return "webdataset"
    if any(is_idx(name) for name in names):
        return "idx"
    if suffixes & set(IMAGE_SUFFIXES):
        return "folder"
    raise InputError(f"--data {uri}: holds no prepared images, nor Parquet, tar, IDX or image files")


def split_part(part: Part, images: int) -> Iterator[Part]:
    """Cuts a part that is one whole tar into parts of so many images; the others are small from the start."""
    if part.source == "webdataset" and not part.count:
        return split_tar(part, images)
    return iter((part,))


def read_part(part: Part) -> Iterator[Item]:
    """The images of a part, in order; an image that is damaged is still an item, with the bytes there are."""
    readers = {
        "digits": _read_digits,
        "idx": read_idx,
        "folder": read_folder,
        "webdataset": read_tar,
        "huggingface": read_parquet,
    }
    return readers[part.source](part)


def _read_digits(part: Part) -> Iterator[Item]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        pixels = np.minimum(np.round(image * (255 / 16)), 255).astype(np.uint8)[..., None]
        yield Item(f"digits/{i:04d}.png", encode_png(pixels), str(label))


def with_class_names(source: SourceListing) -> SourceListing:
    """The listing with the classes by name, in order, where its labels are texts; numbers name themselves.

    Only a WebDataset has labels that nothing lists: where the first of them is a text, all are read once, over the
    cluster, for the names.

    Raises:
        InputError: so many different texts that they can't be classes.
    """
    if source.parts[0].source != "webdataset" or _first_label(source.parts[0]).isdecimal():
        return source
    names = set[str]()
    for found in ActorPool(len(source.parts), gpu=False, least=1, ordered=False)(_Labels(), source.parts):
        names |= found
        if len(names) > MOST_UNNAMED_CLASSES:
            raise InputError(
                f"more than {MOST_UNNAMED_CLASSES:,} different labels, such as {min(names)!r}: those are no classes"
            )
    return replace(source, classes=tuple(sorted(names)))


def _first_label(part: Part) -> str:
    """As it stands beside the first image that has one; a number where none has."""
    return next((item.label for item in read_part(part) if item.label is not None), "0")


class _Labels:
    """All labels in a part; see `pool.Work`."""

    def start(self, device: str) -> Callable[[Part], set[str]]:
        return lambda part: {item.label for item in read_part(part) if item.label is not None}
