"""The parts that a source of images is read in."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Source = Literal["digits", "idx", "folder", "webdataset", "huggingface"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class Item(NamedTuple):
    """One image as it was found; `label` is a class name, or None."""

    path: str
    data: bytes
    label: str | None


@dataclass(frozen=True)
class Part:
    """A part of a source: what one task reads.

    Attributes:
        uris: the files of this part.
        start, count: which of the images, row groups or (of a tar) bytes in them; a count of 0 is all.
        classes: names of integer labels, where the source has them.
    """

    source: Source
    uris: tuple[str, ...] = ()
    start: int = 0
    count: int = 0
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceListing:
    """A source cut into parts.

    Attributes:
        size, channels: of the source's own images, or 0 where they vary.
        classes: of labels, in order; empty where they are only known after reading (WebDataset) or absent.
    """

    parts: tuple[Part, ...]
    size: int = 0
    channels: int = 0
    classes: tuple[str, ...] = ()
