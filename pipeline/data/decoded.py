"""The first stage of jobs/prepare.py: the images of one part of the source, decoded once and kept for the next run.

The files of a part are named after what it was made of: a run that was killed, or that is given more images, finds
what is there and decodes the rest. Their rows lie in the order of the shuffle, so that the second stage (shuffle.py)
reads only what a shard needs.
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

CHUNK_BYTES = 128 * 2**20  # of encoded images that are sorted at once


@dataclass(frozen=True)
class Pixels:
    """What decides the pixels that are made of an image.

    Attributes:
        size: width and height in pixels.
        channels: 1, 3 or 4.
        resize: bring images of other sizes to this one; else they are refused.
        whole: keep all of the longer side, instead of a square out of the middle.
        background: red, green, blue under transparent images.
    """

    size: int
    channels: int
    resize: bool
    whole: bool
    background: tuple[int, int, int]

    def of(self, item: Item) -> np.ndarray:
        """Its pixels, uint8 [H, W, channels].

        Raises:
            DecodeError: it can't be used, and why.
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
        key: of its files.
        before: files of earlier runs in which some of its images may be.
    """

    part: Part
    key: str
    slot: str
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class DecodeParts:
    """Decodes parts over the cluster, and says how many images can be used; see `pool.Work`."""

    pixels: Pixels
    fraction: float
    output: str

    def start(self, device: str) -> Callable[[Task], int]:
        return lambda task: _decode_part(task, self.pixels, self.fraction, self.output)


def key_of(part: Part, tree: Tree, pixels: Pixels) -> str:
    """A name for what is made of a part: another one as soon as its files or the settings are others."""
    versions = [tree.files[name].version for name in part.names if name in tree.files]
    return hashlib.sha256(repr((part, versions, pixels)).encode(errors="surrogateescape")).hexdigest()[:40]


def _decode_part(task: Task, pixels: Pixels, fraction: float, output: str) -> int:
    """Decodes one part, or takes its images from earlier runs, and writes its record last."""
    done, known = Decoded(task.part.split, task.slot), _known_rows(output, task.before)
    waiting, size, labels = list[dict[str, Any]](), 0, Counter[str]()

    def flush() -> None:
        file = f"{PARTS}/{task.key}-{len(done.chunks):03d}.arrow"
        done.chunks.append(write_chunk(output, file, waiting))
        waiting.clear()

    for item in task.part.read():
        digest = item.digest
        if item.label is not None:
            # A damaged image names its class too: raw data is not decoded before its classes are known.
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
    """A uniform 64-bit number, independent of the one by which images are held out."""
    return int.from_bytes(hashlib.sha256(digest + path.encode()).digest()[:8], "big")


def _known_rows(output: str, files: tuple[str, ...]) -> dict[bytes, dict[str, Any]]:
    """Decoded images of earlier runs, by the digest of what they were made of."""
    known = dict[bytes, dict[str, Any]]()
    for file in files:
        columns = ["digest", "pixels", "count", "sum", "squares", "image"]
        for row in read_chunk(output, file).select(columns).to_pylist():
            known[row.pop("digest")] = row
    return known


def slots_of(parts: tuple[Part, ...], pixels: Pixels) -> list[str]:
    """The place of each part in the source: where one starts with the other, an older part may hold the same images.

    Images that were decoded otherwise are others: the source's own number of channels may have changed.
    """
    counts, slots = Counter[str](), list[str]()
    for part in parts:
        slot = part.slot or f"{part.split}|{part.names[0]}|{counts[part.names[0]]}|"
        counts[part.names[0]] += 1
        slots.append(f"{pixels}|{slot}")
    return slots
