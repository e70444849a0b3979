"""What is in a source that was not prepared: one pass over its bytes, which decodes nothing."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipeline.config import Reading
from pipeline.data.images import FORMATS, Encoded
from pipeline.data.labels import names_of_all
from pipeline.data.sources.parts import Part, Request
from pipeline.data.sources.registry import Opened, open_source

IMAGES_PER_PART = 64
THREADS = 8
_COLOURLESS = ("1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")


@dataclass(frozen=True)
class ScannedPart:
    """A part small enough to be read at once, and for each image in it the hash of its content and its label.

    Attributes:
        size: of its images, encoded, in bytes.
        bad: the reason for each image, by its place in the part, that can't be used.
    """

    part: Part
    digests: tuple[bytes, ...]
    labels: tuple[str | None, ...]
    size: int
    bad: dict[int, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scan:
    """What a source holds.

    Attributes:
        parts: those of the splits that are used.
        size: of its images, where they all are squares of one size; else 0.
        channels: 1 where no image has colours, else 3.
        classes: names of the classes, in order.
    """

    opened: Opened
    parts: tuple[ScannedPart, ...]
    size: int
    channels: int
    classes: tuple[str, ...]


def scan(uri: str, reading: Reading, split: tuple[str, ...] = ()) -> Scan:
    """Reads a source through, whatever kind it is of.

    Raises:
        InputError: nothing is there that could be read; labels that can't be classes.
    """
    request = Request(IMAGES_PER_PART, reading.image_column, reading.label_column, split)
    opened = open_source(reading.source, uri, request, "--data")
    listing = opened.listing
    used = [part for part in listing.parts if part.split in opened.roles]
    with ThreadPoolExecutor(THREADS) as pool:
        found = [pair for pairs in pool.map(_scan_part, used) for pair in pairs]
    parts = tuple(part for part, _ in found)
    shapes = {shape for _, some in found for shape in some}
    sizes = {side for width, height, _ in shapes for side in (width, height)}
    labels = dict.fromkeys(label for part in parts for label in part.labels if label is not None)
    # Integers that nothing names are numbers, whatever the first of them is.
    first = "0" if listing.classes is not None else next(iter(labels), "0")
    return Scan(
        opened=opened,
        parts=parts,
        size=sizes.pop() if len(sizes) == 1 else 0,
        channels=3 if any(colour for _, _, colour in shapes) else 1,
        classes=listing.classes or names_of_all(labels, first),
    )


def _scan_part(part: Part) -> list[tuple[ScannedPart, set[tuple[int, int, bool]]]]:
    return list(_scanned(part))


def _scanned(part: Part) -> Iterator[tuple[ScannedPart, set[tuple[int, int, bool]]]]:
    for small in part.cut(IMAGES_PER_PART):
        digests, labels, shapes = list[bytes](), list[str | None](), set[tuple[int, int, bool]]()
        bad, size = dict[int, dict[str, str]](), 0
        for place, item in enumerate(small.read()):
            digests.append(item.digest)
            labels.append(item.label)
            size += len(item.data) if isinstance(item.data, bytes) else item.data.nbytes
            if item.reason:
                bad[place] = {"path": item.path, "reason": item.reason}
            elif shape := _shape(item.data):
                shapes.add(shape)
        yield ScannedPart(small, tuple(digests), tuple(labels), size, bad), shapes


def _shape(data: Encoded) -> tuple[int, int, bool] | None:
    """Width, height and whether there may be colours, from the header; None for what is no image."""
    if isinstance(data, np.ndarray):
        return data.shape[1], data.shape[0], data.shape[2] > 1
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.width, image.height, image.mode not in _COLOURLESS
    except Exception:  # it will be counted, and named, when it is decoded
        return None
