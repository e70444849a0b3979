"""The parts that a source of images is read in: each source has a small type of its own for them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

Source = Literal["digits", "idx", "folder", "webdataset", "huggingface"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class Item(NamedTuple):
    """One image as it was found; `label` is what the source says of its class (see pipeline.data.labels), or None."""

    path: str
    data: bytes
    label: str | None


@dataclass(frozen=True)
class Part(ABC):
    """What one task reads of a source, on any node and by itself; thousands of them travel by pickle.

    Attributes:
        uri: the file or folder that its images lie in.
    """

    uri: str

    @abstractmethod
    def read(self) -> Iterator[Item]:
        """Its images, in order; an image that is damaged is still an item, with the bytes there are."""

    def split(self, images: int) -> Iterator["Part"]:
        """Cuts it into parts of about so many images, where it was not cut small from the start."""
        yield self

    def table(self, rows: np.ndarray) -> pa.Table:
        """Some of its images, by their positions in it (int [N], any order).

        Returns:
            columns bytes (binary), label (int64, class numbers that stand in the file, -1 for none) and path (string).
        """
        items = list(self.read())
        data, paths = [items[row].data for row in rows], [items[row].path for row in rows]
        none = pa.array(np.full(len(rows), -1, np.int64))
        return pa.table(
            {"bytes": pa.array(data, pa.binary()), "label": none, "path": pa.array(paths, pa.string())}
        )


@dataclass(frozen=True)
class SourceListing:
    """A source cut into parts.

    Attributes:
        size, channels: of the source's own images, or 0 where they vary.
        classes: of labels, in order; empty where there are none or numbers name themselves; None where they are only
            known after reading.
    """

    parts: tuple[Part, ...]
    size: int = 0
    channels: int = 0
    classes: tuple[str, ...] | None = ()
