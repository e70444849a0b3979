"""What the first stage of jobs/prepare.py keeps of each part: decoded images in chunks, and a record of them."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.labels import class_numbers, unknown_label
from pipeline.data.manifest import PARTS
from pipeline.stretches import open_file

ROWS_PER_GROUP = 16  # few: a shard takes some rows of every chunk, and reads whole groups
SCHEMA = pa.schema(
    [
        ("key", pa.uint64()),  # place in the shuffled order
        ("digest", pa.binary(32)),  # of the content as it was given
        ("pixels", pa.binary(32)),  # of the pixels
        ("count", pa.int64()),  # of the pixels
        ("sum", pa.list_(pa.int64())),  # of the pixels, by channel
        ("squares", pa.list_(pa.int64())),
        ("label", pa.string()),
        ("path", pa.string()),
        ("image", pa.binary()),  # PNG
    ]
)


@dataclass(frozen=True)
class Chunk:
    """A file of decoded images.

    Attributes:
        file: its name below the output.
        keys: the first key of each of its row groups.
    """

    file: str
    keys: list[int]


@dataclass
class Decoded:
    """What came of one part: `parts/KEY.json` beside its chunks.

    Attributes:
        split: the source's own split that it belongs to.
        slot: its place in the source; see `slots_of`.
        rows, held, bytes: images that can be used, those of them that are held out by their content, and what they
            take.
        labels: how many of the images that can be used have each label; 0 for one that only damaged images have.
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
    """The parts that earlier runs decoded, by key; those of which a file is missing or damaged are left out."""
    folder = storage.join(output, PARTS)
    if not storage.exists(folder):
        return {}
    there = {storage.name(file): file for file in storage.list_files(folder)}
    files = [file for name, file in there.items() if name.endswith(".json") and len(name) == 45]
    records = dict[str, Decoded]()
    for file, data in storage.read_many(files).items():
        try:
            record = Decoded(**json.loads(data))
        except (TypeError, ValueError):
            continue
        record.chunks = [Chunk(**chunk) for chunk in record.chunks]  # type: ignore[arg-type]
        if all(storage.name(chunk.file) in there for chunk in record.chunks):
            records[storage.name(file)[:40]] = record
    return records


def write_chunk(file: str, rows: list[dict[str, Any]]) -> list[int]:
    """Writes rows in the order of their keys; returns the first key of each row group."""
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: (row["key"], row["path"])), SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=ROWS_PER_GROUP, compression="none", write_statistics=False)
    storage.write_atomic(file, buffer.getvalue())
    return [int(table["key"][i].as_py()) for i in range(0, table.num_rows, ROWS_PER_GROUP)]


def rows_between(uri: str, keys: list[int], first: int, last: int) -> pa.Table:
    """Rows of a chunk with keys in [first, last), from the row groups that may hold some.

    Args:
        uri: of the chunk.
        keys: see `Chunk`.
    """
    ends = [*keys[1:], 2**64]
    groups = [n for n, (low, high) in enumerate(zip(keys, ends, strict=True)) if low < last and high >= first]
    if not groups:
        return SCHEMA.empty_table()
    with open_file(uri) as file:
        table = pq.ParquetFile(file, pre_buffer=True).read_row_groups(groups)
    there = table["key"].to_numpy()
    return table.filter(pa.array((there >= first) & (there < last)))


def labels_of(records: dict[str, Decoded]) -> tuple[str, list[str]]:
    """The first label in the source's order (a number where there is none), and all of them."""
    labels = dict.fromkeys(label for record in records.values() for label in record.labels)
    return next(iter(labels), "0"), list(labels)


def unknown_labels(
    records: dict[str, Decoded], classes: tuple[str, ...], output: str
) -> Iterator[dict[str, str]]:
    """Path and reason of each image that can be used but for its label, which is no class."""
    number_of = class_numbers(classes)
    for record in records.values():
        if unknown := [label for label in record.labels if number_of(label) is None]:
            for chunk in record.chunks:
                with open_file(storage.join(output, chunk.file)) as file:
                    table = pq.read_table(file, columns=["path", "label"])
                for row in table.filter(pc.field("label").isin(unknown)).to_pylist():
                    yield {"path": row["path"], "reason": unknown_label(row["label"], classes)}
