"""The second stage of jobs/prepare.py: mixes the decoded images of all parts into shards.

This is a bucket sort on a hash of each image's content and path. Shard s of S holds the images whose hash lies in the
s-th of S equal ranges, sorted by hash. So every shard is a random draw from the whole dataset. Its bytes depend only
on the set of images, not on the parts or runs in which they were decoded.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data.kept import Chunk, Decoded, rows_between
from pipeline.data.labels import class_numbers
from pipeline.data.manifest import PARTS, SHARDS, Shard
from pipeline.data.shard_writer import ShardWriter, shard_schema
from pipeline.data.sources.fetch import in_order
from pipeline.data.sources.splits import held_out

SHARD_BYTES = 512 * 2**20
# One task writes a run of neighbouring shards with the same requests to all chunks. A run holds at most RUN_BYTES,
# and at most 1/RUNS of all shards.
RUN_BYTES, RUNS = 256 * 2**20, 256


@dataclass(frozen=True)
class ShardTask:
    """One shard to write.

    Attributes:
        number, of: number of the shard, from 0, and the number of shards in its split.
        signature: hash of everything that decides its bytes.
    """

    split: str
    number: int
    of: int
    signature: str

    @property
    def file(self) -> str:
        """Path below the output folder."""
        return f"{SHARDS}/{self.split}-{self.number:05d}.parquet"

    def record(self, output: str) -> str:
        """URI of the record of its content."""
        return storage.join(output, PARTS, f"{self.split}-{self.number:05d}.shard")

    @property
    def keys(self) -> tuple[int, int]:
        """Keys of its rows, as [first, end)."""
        return self.number * 2**64 // self.of, (self.number + 1) * 2**64 // self.of


@dataclass(frozen=True)
class WriteShards:
    """Writes runs of neighbouring shards on the cluster and returns the number written; see `pool.Work`.

    Attributes:
        chunks: chunks of decoded images, each with the role of its split ("" = divided by a hash of the content).
        classes: names of the classes.
        fraction: share of images held out for validation where the role is "".
        rows_per_group: images in one row group.
    """

    chunks: tuple[tuple[str, Chunk], ...]
    classes: tuple[str, ...]
    fraction: float
    rows_per_group: int
    channels: int
    output: str

    def start(self, device: str) -> Callable[[tuple[ShardTask, ...]], int]:
        return lambda run: _write_run(run, self)


def shard_tasks(
    records: list[Decoded], roles: dict[str, str], rows_per_shard: int, signature: str
) -> list[ShardTask]:
    """The shards of every split that has images."""
    rows, size = dict[str, int](), dict[str, int]()
    for record in records:
        role = roles[record.split]
        shares = (
            {role: record.rows} if role else {"train": record.rows - record.held, "validation": record.held}
        )
        for split, count in shares.items():
            rows[split] = rows.get(split, 0) + count
            size[split] = size.get(split, 0) + record.bytes * count // max(1, record.rows)
    tasks = []
    for split in sorted(rows):
        count = max(-(-rows[split] // rows_per_shard), -(-size[split] // SHARD_BYTES))
        tasks += [ShardTask(split, number, count, signature) for number in range(count)]
    return tasks


def runs_of(tasks: list[ShardTask], shard_bytes: int) -> list[tuple[ShardTask, ...]]:
    """Cuts shards into runs of neighbours; each run is one task.

    Args:
        shard_bytes: approximate size of a shard, in bytes.
    """
    most = max(1, min(RUN_BYTES // max(1, shard_bytes), len(tasks) // RUNS))
    runs = list[tuple[ShardTask, ...]]()
    for task in tasks:
        last = runs[-1][-1] if runs else None
        follows = last and (last.split, last.number + 1) == (task.split, task.number)
        if follows and len(runs[-1]) < most:
            runs[-1] = (*runs[-1], task)
        else:
            runs.append((task,))
    return runs


def missing(tasks: list[ShardTask], output: str) -> list[ShardTask]:
    """The shards that are not there, or that were not written whole with the same signature."""
    sizes = {storage.name(uri): size for uri, size in storage.sizes(storage.join(output, SHARDS)).items()}
    records = storage.read_many([task.record(output) for task in tasks])

    def is_written(task: ShardTask) -> bool:
        try:
            record: dict[str, Any] = json.loads(records.get(task.record(output), b""))
        except ValueError:
            return False
        shard = record["shard"]
        whole = not shard["rows"] or sizes.get(storage.name(task.file)) == shard["bytes"]
        return whole and record["signature"] == task.signature and record["of"] == task.of

    return [task for task in tasks if not is_written(task)]


def _write_run(run: tuple[ShardTask, ...], work: WriteShards) -> int:
    rows = sorted(_rows(run, work), key=lambda row: (row["key"], row["path"]))
    keys, begin = [row["key"] for row in rows], 0
    for task in run:
        end = bisect_left(keys, task.keys[1])
        _write_shard(task, rows[begin:end], work)
        begin = end
    return len(run)


def _write_shard(task: ShardTask, rows: list[dict[str, Any]], work: WriteShards) -> None:
    number_of = class_numbers(work.classes)
    writer = ShardWriter(shard_schema(work.classes), work.rows_per_group)
    total, square = np.zeros(work.channels, np.int64), np.zeros(work.channels, np.int64)
    fingerprint, count = 0, 0
    for row in rows:
        label = number_of(row["label"])
        if label is None:  # `prepare` lists it in quarantine.jsonl
            continue
        count += row["count"]
        total += row["sum"]
        square += row["squares"]
        content = hashlib.sha256(row["pixels"] + str(row["label"]).encode()).digest()
        fingerprint = (fingerprint + int.from_bytes(content, "big")) % 2**256
        writer.add(row["image"], row["path"], label=None if label < 0 else label, source_sha256=row["digest"])
    data = writer.close()
    shard = Shard(task.file, writer.rows, writer.row_groups, len(data), hashlib.sha256(data).hexdigest())
    if writer.rows:
        storage.write_atomic(storage.join(work.output, task.file), data)
    record = asdict(task) | {
        "shard": asdict(shard),
        "count": count,
        "sum": total.tolist(),
        "squares": square.tolist(),
        "hash": f"{fingerprint:064x}",
    }
    storage.write_atomic(task.record(work.output), json.dumps(record).encode())


def _rows(run: tuple[ShardTask, ...], work: WriteShards) -> Iterator[dict[str, Any]]:
    split, first, last = run[0].split, run[0].keys[0], run[-1].keys[1]

    def read(one: tuple[str, Chunk]) -> pa.Table:
        role, chunk = one
        return _of_split(rows_between(work.output, chunk, first, last), split, role, work.fraction)

    for table in in_order(read, (one for one in work.chunks if one[0] in ("", split)), work.output):
        yield from table.to_pylist()


def _of_split(table: pa.Table, split: str, role: str, fraction: float) -> pa.Table:
    if role:
        return table
    wanted = split == "validation"
    return table.filter(
        pa.array([held_out(d, fraction) == wanted for d in table["digest"].to_pylist()], pa.bool_())
    )
