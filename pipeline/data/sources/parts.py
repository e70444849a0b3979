"""The parts into which a source of images is cut. Each source has a small type of its own for them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data.images import Encoded, encode_png
from pipeline.errors import InputError
from pipeline.redact import printable

# The name in `datasets` for the table of an ImageFolder, which names the image files and their labels.
IMAGE_FOLDER_TABLE = "metadata.parquet"


class Item(NamedTuple):
    """One image as it is in the source.

    Attributes:
        path: printable name in the source.
        data: the encoded bytes, or pixels if the source holds those: uint8 [H, W, C].
        label: the source's own word for its class (see pipeline.data.labels), or None.
        reason: why the image can't be used, if that is known before decoding; else "".
    """

    path: str
    data: Encoded
    label: str | None = None
    reason: str = ""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the encoded bytes, or of the shape and the pixels."""
        if isinstance(self.data, bytes):
            return hashlib.sha256(self.data).digest()
        return hashlib.sha256(str(self.data.shape).encode() + self.data.tobytes()).digest()


@dataclass(frozen=True)
class Part(ABC):
    """A piece of a source that one task can read alone, on any node. Parts are small to pickle.

    Attributes:
        root: URI of the folder that was given.
        names: names of the files in it that this part reads.
        split: the source's own split that its images belong to (train, validation or test); "" for none.
        whole: True if reading one of its images reads them all.
    """

    whole: ClassVar[bool] = False

    root: str
    names: tuple[str, ...]
    split: str = field(default="", kw_only=True)

    @property
    def uri(self) -> str:
        """URI of its first file."""
        return storage.join(self.root, self.names[0])

    @property
    def slot(self) -> str:
        """Its place in the source, if the names of its files don't tell; see `decoded.slots_of`."""
        return ""

    @abstractmethod
    def read(self, rows: Sequence[int] | None = None) -> Iterator[Item]:
        """Yields its images in order. An image that can't be read is still an item, with the reason.

        Args:
            rows: positions in the part; only these images are read, in this order.
        """

    def cut(self, images: int) -> Iterator["Part"]:
        """Cuts the part into parts of about `images` images, if it was not made small in the first place."""
        yield self

    def table(self, rows: np.ndarray) -> pa.Table:
        """Some of its images.

        Args:
            rows: positions in the part, in any order: int [N].

        Returns:
            columns bytes (large_binary), label (int64, class numbers as stored in the file, -1 for none) and path
            (string), in the order of `rows`.
        """
        items = list(self.read(rows.tolist()))
        return image_table(items)


def image_table(items: Sequence[Item]) -> pa.Table:
    """Images as a table of bytes, label (always -1) and path. Pixels are encoded as PNG."""
    data = [item.data if isinstance(item.data, bytes) else encode_png(item.data) for item in items]
    return pa.table(
        {
            "bytes": pa.array(data, pa.large_binary()),
            "label": pa.array(np.full(len(items), -1, np.int64)),
            "path": pa.array([item.path for item in items], pa.string()),
        }
    )


@dataclass(frozen=True)
class SourceListing:
    """A source cut into parts.

    Attributes:
        parts: the parts, in an order that is the same on every machine.
        used: names of the files that the parts read, and of files read for labels.
        size, channels: width and height in pixels, and channels, of the source's images; 0 if they vary.
        classes: class names in order; empty if there are none or labels are plain numbers; None if only reading
            tells.
        ignored: reason by name, for files that are not data.
        bad: reason by name, for files that should hold images but can't be read.
    """

    parts: tuple[Part, ...]
    used: frozenset[str]
    size: int = 0
    channels: int = 0
    classes: tuple[str, ...] | None = ()
    ignored: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """How to read a source.

    Attributes:
        images_per_part: approximate number of images in one part.
        image_column, label_column: columns of Parquet and Arrow files; "" = found by types and usual names.
        split: the source's own splits to use; see `splits.roles_of`.
    """

    images_per_part: int
    image_column: str = ""
    label_column: str = ""
    split: tuple[str, ...] = ()


@dataclass(frozen=True)
class Given:
    """The files of one tree or archive, and how to read them.

    Attributes:
        names: names of all files.
        unreadable: other files in it, with the reason why they are not read.
        read: reads a file: its content and "", or nothing and the reason.
        request: how to read the source.
        where: name of the tree or archive, for errors.
    """

    names: Collection[str]
    unreadable: Mapping[str, str]
    read: Callable[[str], tuple[bytes, str]]
    request: Request
    where: str

    def content(self, name: str) -> bytes:
        """The content of a file with labels.

        Raises:
            InputError: the file can't be read.
        """
        data, reason = self.read(name)
        if reason:
            raise InputError(f"{self.where}/{printable(name)}: {reason}")
        return data


def pick(items: Iterable[Item], rows: Sequence[int] | None) -> Iterator[Item]:
    """The images at some positions of a part that must be read whole to find them."""
    if rows is None:
        yield from items
        return
    wanted = set(rows)
    found = {place: item for place, item in enumerate(items) if place in wanted}
    yield from (found[row] for row in rows)
