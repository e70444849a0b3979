"""Images that lie in a file as pixels, one behind the other: stretches of it are read, and packed files unpacked once."""

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
_UNPACKED_FILES = 8  # that are kept, in files without names, where temporary files are
_COPY_BYTES = 2**22
_unpacking = threading.Lock()


@dataclass(frozen=True)
class Records:
    """Records of equal length in a file, or in what it unpacks to.

    Attributes:
        offset: bytes before the first.
        size: bytes of each.
        packed: "" for a plain file; GZIP; or a member of a zip file.
        version: of the file.
    """

    offset: int
    size: int
    count: int
    packed: str = ""
    version: str = ""

    @property
    def end(self) -> int:
        """From the beginning of the file to the end of the last record."""
        return self.offset + self.size * self.count

    def read(self, uri: str, numbers: Sequence[int]) -> Iterator[bytes]:
        """Some records, in the order given.

        Raises:
            InputError: the file is damaged, or shorter than it was.
        """

        def read(stretch: tuple[int, int]) -> bytes:
            first, count = stretch
            start = self.offset + first * self.size
            stop = start + count * self.size
            if self.packed:
                copy = unpack(uri, self)  # kept open here
                data = os.pread(copy.fileno(), stop - start, start)
            else:
                with refusing(uri):
                    data = read_stretch(uri, start, stop)
            if len(data) != stop - start:
                raise InputError(f"{uri}: ends at byte {start + len(data)}, {self.end} were there before")
            return data

        for data in in_order(read, _stretches(numbers), uri):
            for at in range(0, len(data), self.size):
                yield data[at : at + self.size]

    def check(self, uri: str, size: int) -> None:
        """Raises an InputError where the file, of so many bytes, is damaged or has another length."""
        if self.packed:
            unpack(uri, self)
        elif size != self.end:
            raise InputError(f"{uri}: {_length(size, self.end)}")


def _stretches(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First number and length of each run of numbers that follow each other."""
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
    """What a packed file holds, in a file without a name that goes away with this process.

    Raises:
        InputError: it is damaged, or holds more or less than it says.
    """
    with _unpacking:
        return _unpacked(uri, records.packed, records.version, records.end)


@lru_cache(maxsize=_UNPACKED_FILES)
def _unpacked(uri: str, packed: str, version: str, expected: int) -> IO[bytes]:
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    with refusing(uri), open_file(uri, ahead=_COPY_BYTES) as file:
        try:
            with gzip.open(file) if packed == GZIP else zipfile.ZipFile(file).open(packed) as content:
                # No more than is expected: a few bytes may unpack to more than any disk has.
                while copy.tell() <= expected and (piece := content.read(_COPY_BYTES)):
                    copy.write(piece)
        except (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
            raise InputError(f"{uri}: damaged, get it again: {one_line(error)}") from None
    if copy.tell() != expected:
        raise InputError(f"{uri}: {_length(copy.tell(), expected)}")
    copy.flush()
    return copy


def _length(found: int, expected: int) -> str:
    if found < expected:
        return f"cut short: {found} bytes, {expected} expected: get it again"
    return f"longer than it says: more than {expected} bytes"


@dataclass(frozen=True)
class ArrayPart(Part):
    """Images that follow each other in an array.

    Attributes:
        records: all images of the array.
        shape: of each, as it lies there: [H, W, C], or [C, H, W] where `planes`.
        start: its first image's place in the array.
        labels: of its images.
        faults: place in the part, and reason, of each image whose label can be no class.
        array: the array's name, where the file holds several.
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
    """uint8 [H, W, C] of bytes that are that, or [C, H, W]."""
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
    """Parts of an array.

    Args:
        labels: of each image, with the reason why it can be no class.
    """
    for start in range(0, records.count, images_per_part):
        some = labels[start : start + images_per_part]
        texts = tuple(text for text, _ in some)
        faults = tuple((place, reason) for place, (_, reason) in enumerate(some) if reason)
        yield ArrayPart(root, (name,), records, shape, planes, start, texts, faults, array, split=split)
