"""IDX files, as MNIST is published in."""

import gzip
import posixpath
import struct
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from pipeline import storage
from pipeline.data.images import encode_png
from pipeline.data.sources.parts import Item, Part, SourceListing
from pipeline.errors import InputError

_IMAGES, _LABELS = 2051, 2049


def is_idx(name: str) -> bool:
    return "images" in name and "idx3" in name


@lru_cache(maxsize=2)
def _open_idx(uri: str) -> bytes:
    data = storage.read_bytes(uri)
    try:
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise InputError(f"{uri}: damaged gzip file: {error}") from None


def _idx_header(uri: str) -> tuple[int, int, int, int]:
    """Magic number, count, rows, columns."""
    data = _open_idx(uri)
    if len(data) < 16:
        raise InputError(f"{uri}: not an IDX file")
    magic, count, rows, columns = struct.unpack(">IIII", data[:16])
    if magic == _IMAGES and len(data) != 16 + count * rows * columns:
        raise InputError(f"{uri}: cut short: {len(data)} bytes, {16 + count * rows * columns} expected")
    return magic, count, rows, columns


def list_idx(uri: str, images_per_part: int) -> SourceListing:
    files = storage.list_files(uri)
    images = [file for file in files if is_idx(posixpath.basename(file))]
    if not images:
        raise InputError(f"--input {uri}: no IDX image files (…-images-idx3-ubyte, gzipped or not)")
    parts, size, classes = list[Part](), 0, set[int]()
    for file in images:
        magic, count, rows, columns = _idx_header(file)
        if magic != _IMAGES or rows != columns:
            raise InputError(f"{file}: not an IDX file of square images")
        labels = file.replace("images", "labels").replace("idx3", "idx1")
        pair = (file, labels) if labels in files else (file,)
        if len(pair) == 2:
            classes |= set(_open_idx(labels)[8:])
        size = max(size, rows)
        parts += [
            Part("idx", pair, start, min(images_per_part, count - start))
            for start in range(0, count, images_per_part)
        ]
    names = tuple(str(c) for c in range(max(classes) + 1)) if classes else ()
    return SourceListing(tuple(parts), size, 1, names)


def read_idx(part: Part) -> Iterator[Item]:
    data = _open_idx(part.uris[0])
    _, _, rows, columns = struct.unpack(">IIII", data[:16])
    first = 16 + part.start * rows * columns
    pixels = np.frombuffer(data, np.uint8, part.count * rows * columns, first).reshape(-1, rows, columns, 1)
    labels = (
        _open_idx(part.uris[1])[8:][part.start : part.start + part.count] if len(part.uris) == 2 else None
    )
    name = posixpath.basename(part.uris[0])
    for i, image in enumerate(pixels):
        yield Item(
            f"{name}/{part.start + i:06d}.png", encode_png(image), None if labels is None else str(labels[i])
        )
