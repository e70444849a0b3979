"""The files that jobs/prepare.py's first stage keeps for each part: chunks of decoded images, and a record of them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.labels import class_numbers, unknown_label
from pipeline.data.manifest import PARTS
from pipeline.stretches import read_stretch

# Approximate bytes in one record batch. Batches are small because a shard takes only some rows of every chunk, and
# not smaller because the keys of all batches are held in memory.
BATCH_BYTES = 2**15
SCHEMA = pa.schema(
    [
        ("key", pa.uint64()),  # place in the shuffled order
        ("digest", pa.binary(32)),  # SHA-256 of the encoded image as given
        ("pixels", pa.binary(32)),  # SHA-256 of the decoded pixels
        ("count", pa.int64()),  # number of pixels
        ("sum", pa.list_(pa.int64())),  # sum over the pixels, by channel
        ("squares", pa.list_(pa.int64())),  # sum of squares over the pixels, by channel
        ("label", pa.string()),
        ("path", pa.string()),
        ("image", pa.binary()),  # PNG
    ]
)


@dataclass(frozen=True, eq=False)
class Chunk:
    """A file of decoded images sorted by key, as Arrow record batches one after the other.

    Attributes:
        file: path below the output folder.
        first, last: keys of each batch's first and last row, uint64 [batches].
        ends: byte offset at which each batch ends, int64 [batches].
    """

    file: str
    first: np.ndarray
    last: np.ndarray
    ends: np.ndarray


@dataclass
class Decoded:
    """The record of one decoded part, kept as `parts/KEY.json` beside its chunks.

    Attributes:
        split: the source's own split that the part belongs to.
        slot: place of the part in the source; see `slots_of`.
        rows: number of usable images.
        held: how many of them are held out by their content.
        bytes: size of the usable images, as PNG.
        labels: number of usable images by label; 0 for a label that only damaged images have.
        bad: path and reason of each image that can't be used.
    """

    split: str
    slot: str
    chunks: list[Chunk] = field(default_factory=list)
    rows: int = 0
    held: int = 0
    bytes: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    bad: list[dict[str, str]] = field(default_factory=list)


def record_uri(output: str, key: str) -> str:
    return storage.join(output, PARTS, f"{key}.json")


def read_records(output: str) -> dict[str, Decoded]:
    """The parts that earlier runs decoded, by key. Parts with a missing or cut file or a damaged record are left out."""
    there = storage.sizes(storage.join(output, PARTS))
    sizes = {storage.name(file): size for file, size in there.items()}
    files = [file for file in there if file.endswith(".json") and len(storage.name(file)) == 45]
    records = dict[str, Decoded]()
    for file, data in storage.read_many(files).items():
        try:
            record = Decoded(**json.loads(data))
            record.chunks = [_chunk(**chunk) for chunk in record.chunks]  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
        if all(sizes.get(storage.name(chunk.file)) == chunk.ends[-1] for chunk in record.chunks):
            records[storage.name(file)[:40]] = record
    return records


def _chunk(file: str, first: list[int], last: list[int], ends: list[int]) -> Chunk:
    return Chunk(file, np.array(first, np.uint64), np.array(last, np.uint64), np.array(ends, np.int64))


def write_record(uri: str, record: Decoded) -> None:
    """Writes one record for `read_records`."""
    storage.write_atomic(uri, json.dumps(asdict(record), default=np.ndarray.tolist).encode())


def write_chunk(output: str, file: str, rows: list[dict[str, Any]]) -> Chunk:
    """Writes rows, sorted by key, as one chunk.

    Args:
        file: path below the output folder.
        rows: rows with the columns of `SCHEMA`.
    """
    content, some, size = bytearray(), list[dict[str, Any]](), 0
    first, last, ends = list[int](), list[int](), list[int]()
    rows = sorted(rows, key=lambda row: (row["key"], row["path"]))
    for place, row in enumerate(rows, start=1):
        some.append(row)
        size += len(row["image"])
        if size >= BATCH_BYTES or place == len(rows):
            content += pa.RecordBatch.from_pylist(some, SCHEMA).serialize()
            first.append(some[0]["key"])
            last.append(row["key"])
            ends.append(len(content))
            some, size = [], 0
    storage.write_atomic(storage.join(output, file), bytes(content))
    return _chunk(file, first, last, ends)


def read_chunk(output: str, file: str) -> pa.Table:
    """All rows of a chunk."""
    return _table(storage.read_bytes(storage.join(output, file)))


def rows_between(output: str, chunk: Chunk, first: int, last: int) -> pa.Table:
    """Reads the rows of a chunk with keys in [first, last), in one request, or in none if no batch overlaps."""
    begin = int(np.searchsorted(chunk.last, np.uint64(first)))
    end = int(np.searchsorted(chunk.first, np.uint64(last - 1), side="right"))
    if begin >= end:
        return SCHEMA.empty_table()
    start = int(chunk.ends[begin - 1]) if begin else 0
    table = _table(read_stretch(storage.join(output, chunk.file), start, int(chunk.ends[end - 1])))
    there = table["key"].to_numpy()
    return table.filter(pa.array((there >= first) & (there < last)))


def _table(content: bytes) -> pa.Table:
    """The rows of whole serialised record batches."""
    stream, batches = pa.BufferReader(content), list[pa.RecordBatch]()
    while stream.tell() < len(content):
        batches.append(pa.ipc.read_record_batch(pa.ipc.read_message(stream), SCHEMA))
        batches[-1].validate(full=True)
    return pa.Table.from_batches(batches, SCHEMA)


def labels_of(records: dict[str, Decoded]) -> tuple[str, list[str]]:
    """The first label in the source's order ("0" if there are no labels), and all labels."""
    labels = dict.fromkeys(label for record in records.values() for label in record.labels)
    return next(iter(labels), "0"), list(labels)


def unknown_labels(
    records: dict[str, Decoded], classes: tuple[str, ...], output: str
) -> Iterator[dict[str, str]]:
    """Path and reason of each image that decodes but whose label is no class."""
    number_of = class_numbers(classes)
    for record in records.values():
        if unknown := [label for label in record.labels if number_of(label) is None]:
            for chunk in record.chunks:
                table = read_chunk(output, chunk.file).select(["path", "label"])
                for row in table.filter(pc.field("label").isin(unknown)).to_pylist():
                    yield {"path": row["path"], "reason": unknown_label(row["label"], classes)}
