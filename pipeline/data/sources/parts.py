"""The parts that a source of images is read in: each source has a small type of its own for them."""

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

# What `datasets` calls the table of an ImageFolder: the images are files, and it names them.
IMAGE_FOLDER_TABLE = "metadata.parquet"


class Item(NamedTuple):
    """One image as it was found.

    Attributes:
        path: its name in the source, printable.
        data: the encoded bytes, or the pixels where the source holds those: uint8 [H, W, C].
        label: what the source says of its class (see pipeline.data.labels), or None.
        reason: why it can't be used, where that is known before it is decoded.
    """

    path: str
    data: Encoded
    label: str | None = None
    reason: str = ""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content as it was given."""
        if isinstance(self.data, bytes):
            return hashlib.sha256(self.data).digest()
        return hashlib.sha256(str(self.data.shape).encode() + self.data.tobytes()).digest()


@dataclass(frozen=True)
class Part(ABC):
    """What one task reads of a source, on any node and by itself; thousands of them travel by pickle.

    Attributes:
        root: URI of the folder that was given.
        names: of the files in it that this part reads.
        split: the source's own split that its images belong to (train, validation or test); "" where it has none.
        whole: whether reading one of its images reads them all.
    """

    whole: ClassVar[bool] = False

    root: str
    names: tuple[str, ...]
    split: str = field(default="", kw_only=True)

    @property
    def uri(self) -> str:
        """Of its first file."""
        return storage.join(self.root, self.names[0])

    @property
    def slot(self) -> str:
        """Its place in the source, where its files' names don't tell: see `decoded.slots_of`."""
        return ""

    @abstractmethod
    def read(self, rows: Sequence[int] | None = None) -> Iterator[Item]:
        """Its images, in order; an image that can't be read is still an item, with the reason.

        Args:
            rows: only these, by their positions in the part, in this order.
        """

    def cut(self, images: int) -> Iterator["Part"]:
        """Cuts it into parts of about so many images, where it was not cut small from the start."""
        yield self

    def table(self, rows: np.ndarray) -> pa.Table:
        """Some of its images, by their positions in it (int [N], any order).

        Returns:
            columns bytes (large_binary), label (int64, class numbers that stand in the file, -1 for none) and path
            (string).
        """
        items = list(self.read(rows.tolist()))
        return image_table(items)


def image_table(items: Sequence[Item]) -> pa.Table:
    """Images as rows of bytes, label (-1) and path; pixels are encoded as PNG."""
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
        used: names of the files that its parts read, and of those that were read for labels.
        size, channels: of the source's own images, or 0 where they vary.
        classes: of labels, in order; empty where there are none or numbers name themselves; None where they are only
            known after reading.
        ignored: files that are no data, by name, with the reason.
        bad: files that should hold images and can't be read, by name, with the reason.
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
    """How a source is to be read.

    Attributes:
        images_per_part: about so many images go into one part.
        image_column, label_column: of Parquet and Arrow files; "" = found by their types and usual names.
        split: the source's own splits to use; see `splits.roles_of`.
    """

    images_per_part: int
    image_column: str = ""
    label_column: str = ""
    split: tuple[str, ...] = ()


@dataclass(frozen=True)
class Given:
    """What lies in one tree or in one archive, and how it is to be read.

    Attributes:
        names: of all files.
        unreadable: files that are there as well, and why they are not read.
        read: the content of a file, or nothing and the reason.
        where: its own name, for errors.
    """

    names: Collection[str]
    unreadable: Mapping[str, str]
    read: Callable[[str], tuple[bytes, str]]
    request: Request
    where: str

    def content(self, name: str) -> bytes:
        """Of a file that holds labels.

        Raises:
            InputError: it can't be read.
        """
        data, reason = self.read(name)
        if reason:
            raise InputError(f"{self.where}/{printable(name)}: {reason}")
        return data


def pick(items: Iterable[Item], rows: Sequence[int] | None) -> Iterator[Item]:
    """Some of a part's images, where the whole part must be read for them."""
    if rows is None:
        yield from items
        return
    wanted = set(rows)
    found = {place: item for place, item in enumerate(items) if place in wanted}
    yield from (found[row] for row in rows)
