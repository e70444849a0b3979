"""IDX files, as MNIST is published in."""

import gzip
import posixpath
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline import storage
from pipeline.data.images import encode_png
from pipeline.data.labels import label_text, name_classes
from pipeline.data.sources.parts import Item, Part, SourceListing
from pipeline.errors import InputError

_IMAGES = 2051


@dataclass(frozen=True)
class IdxPart(Part):
    """Images that follow each other in one file.

    Attributes:
        labels: the file of their labels, or "".
    """

    labels: str
    start: int
    count: int

    def read(self) -> Iterator[Item]:
        data, labels = _open_idx(self.uri), _labels(self.labels)
        _, _, rows, columns = struct.unpack(">IIII", data[:16])
        first = 16 + self.start * rows * columns
        pixels = np.frombuffer(data, np.uint8, self.count * rows * columns, first)
        name = posixpath.basename(self.uri)
        for i, image in enumerate(pixels.reshape(-1, rows, columns, 1), self.start):
            label = label_text(labels[i]) if self.labels else None
            yield Item(f"{name}/{i:06d}.png", encode_png(image), label)


def is_idx(name: str) -> bool:
    return "images" in name and "idx3" in name


@lru_cache(maxsize=2)
def _open_idx(uri: str) -> bytes:
    data = storage.read_bytes(uri)
    try:
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise InputError(f"{uri}: damaged gzip file: {error}") from None


def _labels(uri: str) -> bytes:
    return _open_idx(uri)[8:] if uri else b""


def _idx_header(uri: str) -> tuple[int, int, int, int]:
    """Magic number, count, rows, columns."""
    data = _open_idx(uri)
    if len(data) < 16:
        raise InputError(f"{uri}: not an IDX file")
    magic, count, rows, columns = struct.unpack(">IIII", data[:16])
    if magic == _IMAGES and len(data) != 16 + count * rows * columns:
        raise InputError(f"{uri}: cut short: {len(data)} bytes, {16 + count * rows * columns} expected")
    return magic, count, rows, columns


def list_idx(uri: str, files: list[str], images_per_part: int) -> SourceListing:
    images = [file for file in files if is_idx(posixpath.basename(file))]
    if not images:
        raise InputError(f"--input {uri}: no IDX image files (…-images-idx3-ubyte, gzipped or not)")
    parts, size, classes = list[Part](), 0, set[int]()
    for file in images:
        magic, count, rows, columns = _idx_header(file)
        if magic != _IMAGES or rows != columns:
            raise InputError(f"{file}: not an IDX file of square images")
        labels = file.replace("images", "labels").replace("idx3", "idx1")
        labels = labels if labels in files else ""
        classes |= set(_labels(labels))
        size = max(size, rows)
        parts += [
            IdxPart(file, labels, start, min(images_per_part, count - start))
            for start in range(0, count, images_per_part)
        ]
    return SourceListing(tuple(parts), size, 1, name_classes(map(str, classes)))
