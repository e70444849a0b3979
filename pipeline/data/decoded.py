"""The first stage of jobs/prepare.py: decodes each part of the source once and keeps the images for later runs.

A part's files are named by a hash of its input files and settings. A run that follows a killed one, or a run on a
source that grew, finds the finished parts and decodes the rest. Rows are sorted by the shuffle's key, so the second
stage (shuffle.py) reads only the rows that a shard needs.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.images import DecodeError, decode, encode_png, fit, open_image
from pipeline.data.kept import Decoded, read_chunk, record_uri, write_chunk, write_record
from pipeline.data.manifest import PARTS
from pipeline.data.sources.parts import Item, Part
from pipeline.data.sources.splits import held_out
from pipeline.data.sources.tree import Tree

CHUNK_BYTES = 128 * 2**20  # encoded images that are sorted in memory at once


@dataclass(frozen=True)
class Pixels:
    """The settings that decide an image's pixels.

    Attributes:
        size: width and height in pixels.
        channels: 1 = grey, 3 = RGB, 4 = RGBA.
        resize: resize images of another size; if False, they are refused.
        whole: keep the whole longer side, instead of a square from the centre.
        background: red, green and blue behind transparent pixels, 0 to 255.
    """

    size: int
    channels: int
    resize: bool
    whole: bool
    background: tuple[int, int, int]

    def of(self, item: Item) -> np.ndarray:
        """The pixels of one image, uint8 [H, W, channels].

        Raises:
            DecodeError: the image can't be used; the message says why.
        """
        if item.reason:
            raise DecodeError(item.reason)
        if not self.resize and (size := open_image(item.data).size) != (self.size, self.size):
            raise DecodeError(f"{size[0]}x{size[1]} pixels, not {self.size}x{self.size}: give --image-size")
        read = fit if self.whole else decode
        return read(item.data, self.size, self.channels, background=self.background)


@dataclass(frozen=True)
class Task:
    """One part to decode.

    Attributes:
        key: name of the part's files; see `key_of`.
        slot: place of the part in the source; see `slots_of`.
        before: chunk files of earlier runs that may hold some of its images.
    """

    part: Part
    key: str
    slot: str
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class DecodeParts:
    """Decodes parts on the cluster and returns the number of usable images in each; see `pool.Work`."""

    pixels: Pixels
    fraction: float
    output: str

    def start(self, device: str) -> Callable[[Task], int]:
        return lambda task: _decode_part(task, self.pixels, self.fraction, self.output)


def key_of(part: Part, tree: Tree, pixels: Pixels) -> str:
    """Hash that names a part's decoded files. It changes when the part's files or the settings change."""
    versions = [tree.files[name].version for name in part.names if name in tree.files]
    return hashlib.sha256(repr((part, versions, pixels)).encode(errors="surrogateescape")).hexdigest()[:40]


def _decode_part(task: Task, pixels: Pixels, fraction: float, output: str) -> int:
    """Decodes one part, reusing images of earlier runs, and writes its record last.

    Returns:
        the number of usable images.
    """
    done, known = Decoded(task.part.split, task.slot), _known_rows(output, task.before)
    waiting, size, labels = list[dict[str, Any]](), 0, Counter[str]()

    def flush() -> None:
        file = f"{PARTS}/{task.key}-{len(done.chunks):03d}.arrow"
        done.chunks.append(write_chunk(output, file, waiting))
        waiting.clear()

    for item in task.part.read():
        digest = item.digest
        if item.label is not None:
            # A damaged image counts for the list of classes too. Training on raw files lists classes before it
            # decodes, so both must agree.
            labels[item.label] += 0
        row = known.get(digest)
        try:
            if row is None or item.reason:
                row = _row(pixels.of(item))
        except DecodeError as error:
            done.bad.append({"path": item.path, "reason": str(error)})
            continue
        if item.label is not None:
            labels[item.label] += 1
        done.rows += 1
        done.held += held_out(digest, fraction)
        done.bytes += len(row["image"])
        size += len(row["image"])
        waiting.append(
            row
            | {"key": _order_key(digest, item.path), "digest": digest, "label": item.label, "path": item.path}
        )
        if size >= CHUNK_BYTES:
            flush()
            size = 0
    if waiting:
        flush()
    done.labels = dict(labels)
    write_record(record_uri(output, task.key), done)
    return done.rows


def _row(pixels: np.ndarray) -> dict[str, Any]:
    values = pixels.reshape(-1, pixels.shape[-1]).astype(np.int64)
    return {
        "pixels": hashlib.sha256(pixels.tobytes()).digest(),
        "count": len(values),
        "sum": values.sum(0).tolist(),
        "squares": (values**2).sum(0).tolist(),
        "image": encode_png(pixels),
    }


def _order_key(digest: bytes, path: str) -> int:
    """A uniform 64-bit sort key, independent of the hash that decides which images are held out."""
    return int.from_bytes(hashlib.sha256(digest + path.encode()).digest()[:8], "big")


def _known_rows(output: str, files: tuple[str, ...]) -> dict[bytes, dict[str, Any]]:
    """Rows of decoded images from earlier runs, by the SHA-256 of the encoded image."""
    known = dict[bytes, dict[str, Any]]()
    for file in files:
        columns = ["digest", "pixels", "count", "sum", "squares", "image"]
        for row in read_chunk(output, file).select(columns).to_pylist():
            known[row.pop("digest")] = row
    return known


def slots_of(parts: tuple[Part, ...], pixels: Pixels) -> list[str]:
    """A string for each part's place in the source. If one part's string starts with another's, they may share images.

    The string begins with the pixel settings, since images that were decoded with other settings can't be reused.
    Those settings include the source's own number of channels, which may have changed.
    """
    counts, slots = Counter[str](), list[str]()
    for part in parts:
        slot = part.slot or f"{part.split}|{part.names[0]}|{counts[part.names[0]]}|"
        counts[part.names[0]] += 1
        slots.append(f"{pixels}|{slot}")
    return slots
