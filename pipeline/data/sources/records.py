"""Reads images stored in a file as raw pixels, one after the other. Packed files are unpacked once."""

import gzip
import os
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import IO

import numpy as np

from pipeline.data.sources.fetch import in_order, refusing
from pipeline.data.sources.parts import Item, Part
from pipeline.errors import InputError
from pipeline.redact import one_line, printable
from pipeline.stretches import open_file, read_stretch

GZIP = "gzip"
_UNPACKED_FILES = 8  # unpacked copies to keep, as unnamed temporary files
_COPY_BYTES = 2**22
_unpacking = threading.Lock()


@dataclass(frozen=True)
class Records:
    """Records of equal length in a file, or in its unpacked content.

    Attributes:
        offset: bytes before the first record.
        size: bytes of each record.
        count: number of records.
        packed: "" for a plain file, GZIP, or the name of a member of a zip file.
        version: version of the file; see `tree.File`.
    """

    offset: int
    size: int
    count: int
    packed: str = ""
    version: str = ""

    @property
    def end(self) -> int:
        """Byte offset of the end of the last record."""
        return self.offset + self.size * self.count

    def read(self, uri: str, numbers: Sequence[int]) -> Iterator[bytes]:
        """Reads records in the order given.

        Raises:
            InputError: the file is damaged, or shorter than it was.
        """

        def read(stretch: tuple[int, int]) -> bytes:
            first, count = stretch
            start = self.offset + first * self.size
            stop = start + count * self.size
            if self.packed:
                copy = unpack(uri, self)  # this reference keeps the copy open
                data = os.pread(copy.fileno(), stop - start, start)
            else:
                with refusing(uri):
                    data = read_stretch(uri, start, stop)
            if len(data) != stop - start:
                raise InputError(f"{uri}: ends at byte {start + len(data)}, earlier at byte {self.end}")
            return data

        for data in in_order(read, _stretches(numbers), uri):
            for at in range(0, len(data), self.size):
                yield data[at : at + self.size]

    def check(self, uri: str, size: int) -> None:
        """Raises InputError if the file, which has `size` bytes, is damaged or has the wrong length."""
        if self.packed:
            unpack(uri, self)
        elif size != self.end:
            raise InputError(f"{uri}: {_length(size, self.end)}")


def _stretches(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First number and length of each run of consecutive numbers."""
    first, count = 0, 0
    for number in numbers:
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count


def unpack(uri: str, records: Records) -> IO[bytes]:
    """The content of a packed file, in an unnamed temporary file that disappears with this process.

    Raises:
        InputError: the file is damaged, or holds more or less than expected.
    """
    with _unpacking:
        return _unpacked(uri, records.packed, records.version, records.end)


@lru_cache(maxsize=_UNPACKED_FILES)
def _unpacked(uri: str, packed: str, version: str, expected: int) -> IO[bytes]:
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    with refusing(uri), open_file(uri, ahead=_COPY_BYTES) as file:
        try:
            with gzip.open(file) if packed == GZIP else zipfile.ZipFile(file).open(packed) as content:
                # Unpacks little more than expected, because a few bytes may unpack to more than a disk holds.
                while copy.tell() <= expected and (piece := content.read(_COPY_BYTES)):
                    copy.write(piece)
        except (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
            raise InputError(f"{uri}: damaged, download it again: {one_line(error)}") from None
    if copy.tell() != expected:
        raise InputError(f"{uri}: {_length(copy.tell(), expected)}")
    copy.flush()
    return copy


def _length(found: int, expected: int) -> str:
    if found < expected:
        return f"cut short: {found} bytes, {expected} expected: download it again"
    return f"longer than its header says: more than {expected} bytes"


@dataclass(frozen=True)
class ArrayPart(Part):
    """Consecutive images of an array.

    Attributes:
        records: all images of the array.
        shape: stored shape of each image: [H, W, C], or [C, H, W] if `planes`.
        start: number of its first image in the array.
        labels: labels of its images.
        faults: (position in the part, reason) of each image whose label can't be a class.
        array: name of the array, if the file holds several.
    """

    records: Records
    shape: tuple[int, int, int]
    planes: bool
    start: int
    labels: tuple[str | None, ...]
    faults: tuple[tuple[int, str], ...] = ()
    array: str = ""

    def read(self, rows: Sequence[int] | None = None) -> Iterator[Item]:
        places = range(len(self.labels)) if rows is None else rows
        data, faults = (
            self.records.read(self.uri, [self.start + place for place in places]),
            dict(self.faults),
        )
        stem = printable(f"{self.names[0]}/{self.array}/" if self.array else f"{self.names[0]}/")
        for place, pixels in zip(places, data, strict=True):
            path, reason = f"{stem}{self.start + place:06d}.png", faults.get(place, "")
            label = self.labels[place]
            yield Item(path, b"" if reason else to_pixels(pixels, self.shape, self.planes), label, reason)


def to_pixels(data: bytes, shape: tuple[int, int, int], planes: bool) -> np.ndarray:
    """Raw bytes of shape [H, W, C], or [C, H, W] if `planes`, as uint8 [H, W, C]."""
    pixels = np.frombuffer(data, np.uint8).reshape(shape)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)) if planes else pixels


def cut_array(
    root: str,
    name: str,
    records: Records,
    shape: tuple[int, int, int],
    planes: bool,
    labels: Sequence[tuple[str | None, str]],
    images_per_part: int,
    split: str,
    array: str = "",
) -> Iterator[ArrayPart]:
    """Cuts an array into parts.

    Args:
        labels: label of each image, and the reason why it can't be a class or "".
        array: name of the array, if the file holds several.
    """
    for start in range(0, records.count, images_per_part):
        some = labels[start : start + images_per_part]
        texts = tuple(text for text, _ in some)
        faults = tuple((place, reason) for place, (_, reason) in enumerate(some) if reason)
        yield ArrayPart(root, (name,), records, shape, planes, start, texts, faults, array, split=split)
