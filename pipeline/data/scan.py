"""Scans raw data: reads every file once, without decoding, for hashes, labels and image sizes."""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline import storage
from pipeline.cluster.pool import ActorPool
from pipeline.config import Reading
from pipeline.data.images import FORMATS, Encoded
from pipeline.data.labels import names_of_all
from pipeline.data.sources.parts import Part, Request
from pipeline.data.sources.registry import Opened, open_source
from pipeline.data.sources.tar_index import TarImage
from pipeline.data.sources.tars import TarPart

SCAN = "scan.parquet"  # file in a run's folder
IMAGES_PER_PART = 64
THREADS = 8
# The whole cluster reads more than this. Less is read in this process, which saves the seconds of starting Ray.
ON_CLUSTER_BYTES = 2**30
CPUS = 0.25  # CPUs of a scanning actor, which mostly waits for storage
# Text is stored as JSON, because names may be invalid UTF-8.
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("members", pa.string()),  # members of a tar, where its headers were read
        ("digests", pa.binary()),
        ("labels", pa.string()),
        ("size", pa.int64()),
        ("shapes", pa.string()),
        ("bad", pa.string()),
    ]
)
_COLOURLESS = ("1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")


@dataclass(frozen=True)
class ScannedPart:
    """A part small enough to be read at once, with the hash and the label of each image in it.

    Attributes:
        size: size of its encoded images, in bytes.
        digests, labels: SHA-256 and label of each image, in order; the label is None for no label.
        shapes: (width, height, True if it may have colours) of the images whose header could be read.
        bad: path and reason of each image that can't be used, by its place in the part.
    """

    part: Part
    digests: tuple[bytes, ...]
    labels: tuple[str | None, ...]
    size: int
    shapes: frozenset[tuple[int, int, bool]]
    bad: dict[int, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scan:
    """The content of a source.

    Attributes:
        opened: the source.
        parts: parts of the splits that are used.
        size: width and height in pixels if all images are squares of one size; else 0.
        channels: 1 if no image has colours, else 3.
        classes: names of the classes, in order.
        to_keep: the scan as a file, for `scan` to read again; empty if the file that is there says the same.
    """

    opened: Opened
    parts: tuple[ScannedPart, ...]
    size: int
    channels: int
    classes: tuple[str, ...]
    to_keep: bytes


def scan(uri: str, reading: Reading, split: tuple[str, ...] = (), kept: str = "") -> Scan:
    """Reads a source of any kind through.

    Args:
        reading: how to read raw data.
        split: the source's own splits to use; see `splits.roles_of`.
        kept: URI of an earlier scan, if there is one. Files that did not change since are not read again.

    Raises:
        InputError: the source holds nothing that can be read, or labels that can't be classes.
    """
    request = Request(IMAGES_PER_PART, reading.image_column, reading.label_column, split)
    opened = open_source(reading.source, uri, request, "--data")
    listing = opened.listing
    used = [part for part in listing.parts if part.split in opened.roles]
    keys, before = [_key(part, opened) for part in used], _read_kept(kept) if kept else {}

    new = [part for part, key in zip(used, keys, strict=True) if key not in before]
    results = iter(_scan_all(new, opened.size_of(new)))
    found = [
        [_unpack(row, part) for row in before[key]] if key in before else next(results)
        for part, key in zip(used, keys, strict=True)
    ]
    parts = tuple(part for some in found for part in some)
    sizes = {side for part in parts for width, height, _ in part.shapes for side in (width, height)}
    labels = dict.fromkeys(label for part in parts for label in part.labels if label is not None)
    # Integer labels without names count as numbers, whatever the first label looks like.
    first = "0" if listing.classes is not None else next(iter(labels), "0")
    return Scan(
        opened=opened,
        parts=parts,
        size=sizes.pop() if len(sizes) == 1 else 0,
        channels=3 if any(colour for part in parts for *_, colour in part.shapes) else 1,
        classes=listing.classes or names_of_all(labels, first),
        to_keep=b"" if before.keys() >= set(keys) else _to_keep(keys, found),
    )


class ScanParts:
    """Scans parts on the cluster; see `pool.Work`."""

    def start(self, device: str) -> Callable[[Part], list[ScannedPart]]:
        return _scanned


def _scan_all(parts: list[Part], size: int) -> list[list[ScannedPart]]:
    """Scans each part, in order.

    Args:
        size: size of their files, in bytes.
    """
    if size > ON_CLUSTER_BYTES:
        return list(ActorPool(gpu=False, cpus=CPUS)(ScanParts(), parts, title="read the data once"))
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_scanned, parts))


def _key(part: Part, opened: Opened) -> str:
    """Hash that identifies a part's scan. It changes when the part's files change, or what is read of them."""
    files = opened.tree.files
    versions = [files[name].version for name in part.names if name in files]
    return hashlib.sha256(repr((part, versions)).encode(errors="surrogateescape")).hexdigest()


def _to_keep(keys: list[str], found: list[list[ScannedPart]]) -> bytes:
    rows = [_pack(part) | {"key": key} for key, some in zip(keys, found, strict=True) for part in some]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def _read_kept(uri: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of an earlier scan, by the part's key; empty if there is none or it is damaged."""
    kept = dict[str, list[dict[str, Any]]]()
    with contextlib.suppress(OSError, pa.ArrowException):
        for row in pq.read_table(io.BytesIO(storage.read_bytes(uri)), schema=_SCHEMA).to_pylist():
            kept.setdefault(row["key"], []).append(row)
    return kept


def _pack(scanned: ScannedPart) -> dict[str, Any]:
    members = scanned.part.members if isinstance(scanned.part, TarPart) else ()
    return {
        "members": json.dumps(members),
        "digests": b"".join(scanned.digests),
        "labels": json.dumps(scanned.labels),
        "size": scanned.size,
        "shapes": json.dumps(sorted(scanned.shapes)),
        "bad": json.dumps(list(scanned.bad.items())),
    }


def _unpack(row: dict[str, Any], part: Part) -> ScannedPart:
    members = tuple(
        TarImage._make([*some, tuple((at, size) for at, size in pieces)])
        for *some, pieces in json.loads(row["members"])
    )
    return ScannedPart(
        part=replace(part, members=members) if members and isinstance(part, TarPart) else part,
        digests=tuple(row["digests"][at : at + 32] for at in range(0, len(row["digests"]), 32)),
        labels=tuple(json.loads(row["labels"])),
        size=row["size"],
        shapes=frozenset((width, height, colour) for width, height, colour in json.loads(row["shapes"])),
        bad=dict(json.loads(row["bad"])),
    )


def _scanned(part: Part) -> list[ScannedPart]:
    scanned = []
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
        scanned.append(ScannedPart(small, tuple(digests), tuple(labels), size, frozenset(shapes), bad))
    return scanned


def _shape(data: Encoded) -> tuple[int, int, bool] | None:
    """Width, height and True if there may be colours, from the header; None if the data is no image."""
    if isinstance(data, np.ndarray):
        return data.shape[1], data.shape[0], data.shape[2] > 1
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.width, image.height, image.mode not in _COLOURLESS
    except Exception:  # decoding will count and name it
        return None
