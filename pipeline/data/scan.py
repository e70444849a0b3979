"""What is in a source that was not prepared: one pass over its bytes, which decodes nothing."""

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from pipeline.data.labels import names_of_all
from pipeline.data.sources.parts import Part
from pipeline.data.sources.registry import list_source

IMAGES_PER_PART = 64
THREADS = 8
_COLOURLESS = ("1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")


@dataclass(frozen=True)
class ScannedPart:
    """A part small enough to be read at once, and for each image in it the hash of its content and its label."""

    part: Part
    digests: tuple[bytes, ...]
    labels: tuple[str | None, ...]


@dataclass(frozen=True)
class Scan:
    """What a source holds.

    Attributes:
        size: of its images, where they all are squares of one size; else 0.
        channels: 1 where no image has colours, else 3.
        classes: names of the classes, in order.
        fingerprint: a hash of the set of (bytes, label) pairs: how they are cut into files does not matter.
    """

    parts: tuple[ScannedPart, ...]
    size: int
    channels: int
    classes: tuple[str, ...]
    fingerprint: str


def scan(uri: str) -> Scan:
    """Reads a source through, whatever kind it is of.

    Raises:
        InputError: nothing is there that could be read; labels that can't be classes.
    """
    listing = list_source("auto", uri, IMAGES_PER_PART)
    with ThreadPoolExecutor(THREADS) as pool:
        found = [pair for pairs in pool.map(_scan_part, listing.parts) for pair in pairs]
    parts = tuple(part for part, _ in found)
    shapes = {shape for _, some in found for shape in some}
    sizes = {side for width, height, _ in shapes for side in (width, height)}
    labels = dict.fromkeys(label for part in parts for label in part.labels if label is not None)
    # Integers that nothing names are numbers, whatever the first of them is.
    first = "0" if listing.classes is not None else next(iter(labels), "0")
    total = sum(int.from_bytes(digest, "big") for part in parts for digest in part.digests)
    return Scan(
        parts=parts,
        size=sizes.pop() if len(sizes) == 1 else 0,
        channels=3 if any(colour for _, _, colour in shapes) else 1,
        classes=listing.classes or names_of_all(labels, first),
        fingerprint=f"{total % 2**256:064x}",
    )


def _scan_part(part: Part) -> list[tuple[ScannedPart, set[tuple[int, int, bool]]]]:
    return list(_scanned(part))


def _scanned(part: Part) -> Iterator[tuple[ScannedPart, set[tuple[int, int, bool]]]]:
    for small in part.split(IMAGES_PER_PART):
        digests, labels, shapes = list[bytes](), list[str | None](), set[tuple[int, int, bool]]()
        for item in small.read():
            digests.append(hashlib.sha256(item.data + b"\0" + str(item.label).encode()).digest())
            labels.append(item.label)
            if shape := _shape(item.data):
                shapes.add(shape)
        yield ScannedPart(small, tuple(digests), tuple(labels)), shapes


def _shape(data: bytes) -> tuple[int, int, bool] | None:
    """Width, height and whether there may be colours, from the header; None for what is no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.width, image.height, image.mode not in _COLOURLESS
    except Exception:  # it will be counted, and named, when it is decoded
        return None
