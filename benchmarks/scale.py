"""Measures the cost of reading at any size on one machine.

    python -m benchmarks.scale [--smoke]

Most figures use the real index and plan, whose reads are only counted. "S3" comes from real reads at a local server.

- "bytes over used": bytes that all ranks read in an epoch, divided by the bytes in their batches. One row needs its whole
  row group, but an image of a folder or tar is read alone. Measured for data prepared at the defaults, for a folder, and
  for the example of docs/operations.md (with 16 rows per group instead of 1,024, since only ratios count), each also with
  a tenth of the rows held out by content.
- "groups": row groups of data prepared at the defaults: rows in each, groups per lane at batches of 256 and 1,024, and
  megabytes of a first batch of 256.
- "classes": classes in a batch of 256, from 1,000 classes with 1,280 images each that are stored class by class. A random
  batch would have 226. Also classes in four consecutive batches, where random ones would have 641.
- "S3": one epoch of small prepared images, read from a local S3 server by ranks in processes of their own: bytes that the
  server sent, divided by the encoded bytes in the batches, and the requests, beside the number of row groups and footers.
- "start": seconds until 256 ranks have their stream of 976,563 row groups and one rank has planned its first batches,
  bytes of a pickled stream, and bytes of the index per group.
"""

import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray import cloudpickle

from pipeline.cluster.session import connect
from pipeline.config import ImageConfig
from pipeline.data.groups import Group, RowGroups, row_groups
from pipeline.data.index import GROUP_ROWS, DatasetIndex, open_splits
from pipeline.data.order import Plan, batch_rows, cut, lanes_for, rows_per_group
from pipeline.data.reads import RankRows
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.data.sources.parts import Part
from pipeline.data.stream import PlannedData, share
from tests.data import s3

IMAGE = ImageConfig(64, 3)
CLASSES, PER_CLASS, BATCH = 1000, 1280, 256
# The example of docs/operations.md.
IMAGES, IMAGE_BYTES, LARGE_BATCH = 10**9, 6000, 8192
GROUPS = -(-IMAGES // rows_per_group(IMAGES, IMAGES * IMAGE_BYTES))


@dataclass(frozen=True)
class Counted(Part):
    """Rows that do not exist. It counts the rows that must be read for them.

    Attributes:
        rows: rows of the row group that is read for any of them; 0 = each row is read alone.
        read_rows: numbers of rows read so far, one for each call.
    """

    rows: int = 0
    read_rows: ClassVar[list[int]] = []

    def read(self, rows: Any = None) -> Any:
        raise NotImplementedError

    def table(self, rows: np.ndarray) -> pa.Table:
        self.read_rows.append(self.rows or len(rows))
        return pa.table(
            {
                "bytes": pa.array([b""] * len(rows), pa.large_binary()),
                "label": np.zeros(len(rows), np.int64),
                "path": pa.array([""] * len(rows)),
            }
        )


def bytes_over_used(sizes: np.ndarray, plan: Plan, worlds: tuple[int, ...]) -> dict[str, float]:
    """Rows read, divided by rows used, by number of ranks.

    Args:
        sizes: rows of each group, held-out ones included, int [groups].
        worlds: numbers of ranks.
    """
    groups = [
        Group(Counted("", ("",), rows=int(size) if plan.whole else 0), int(rows))
        for size, rows in zip(sizes, plan.group_rows, strict=True)
    ]
    index = DatasetIndex("", "train", IMAGE, groups, "")
    steps, ratios = plan.rows // plan.batch_size, {}
    for world in worlds:
        Counted.read_rows.clear()
        for rank in range(world):
            first, last = cut(plan.batch_size, rank, world)
            for _ in RankRows(index, plan, first, last, steps).tables(0, steps, 512):
                pass
        used = steps * plan.batch_size * (sizes.sum() / plan.rows if plan.whole else 1)
        ratios[f"{world} ranks"] = round(sum(Counted.read_rows) / used, 3)
    return ratios


def planned(sizes: np.ndarray, image_bytes: int, batch: int, held_out: bool, whole: bool = True) -> Plan:
    """Makes the plan for groups of these sizes.

    Args:
        sizes: rows of each group, int [groups].
        held_out: True holds out a tenth of the rows.
        whole: True if a row group is read as a whole.
    """
    rows = np.random.default_rng(0).binomial(sizes, 0.9) if held_out else sizes
    lanes = lanes_for(len(sizes), image_bytes * int(rows.sum()), batch)
    return Plan(rows, 0, batch, lanes, whole)


def reading(smoke: bool) -> dict[str, Any]:
    """Bytes read divided by bytes used, for each kind of data."""
    each = rows_per_group(10_000, 10_000 * 6000)
    prepared, folder = np.full(10_000 // each, each), np.full(10_000 // GROUP_ROWS, GROUP_ROWS)
    large = np.full(10_240 if smoke else GROUPS // 10, 16)
    found: dict[str, Any] = {}
    for held_out in (False, True):
        name = ", a tenth held out" if held_out else ""
        plan = planned(prepared, 6000, 128, held_out)
        found[f"prepared, 10,000 images{name}"] = bytes_over_used(prepared, plan, (3, 4, 7, 8))
        plan = planned(folder, 6000, 128, held_out, whole=False)
        found[f"folder, 10,000 images{name}"] = bytes_over_used(folder, plan, (3, 4, 7, 8))
        lanes = lanes_for(GROUPS, IMAGES * IMAGE_BYTES, LARGE_BATCH)
        plan = replace(planned(large, IMAGE_BYTES, LARGE_BATCH, held_out), lanes=lanes)
        ratios = bytes_over_used(large, plan, (256,) if smoke else (4, 8, 256))
        found[f"docs/operations.md{name}"] = ratios | {"lanes": lanes}
    return found


def at_a_server(bucket: str, smoke: bool) -> dict[str, Any]:
    """Bytes and requests of an epoch at an S3 server, by number of ranks."""
    folder, images = f"{bucket}/data", 1000 if smoke else 10_000
    with tempfile.TemporaryDirectory() as here:
        pixels = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
        np.savez(f"{here}/images.npz", pixels)
        prepare(
            PrepareConfig(folder, input=f"{here}/images.npz", validation_fraction=0.0, rows_per_shard=2500)
        )
    index = open_splits(folder).indexes["train"]
    plan = index.plan(0, 128)
    shared, steps = ray.put((index, plan)), plan.rows // plan.batch_size

    @ray.remote(max_calls=1)  # a new process for each rank, which has read no footer
    def read(rank: int, world: int) -> int:
        index, plan = ray.get(shared)
        reader = RankRows(index, plan, *cut(plan.batch_size, rank, world), steps)
        return sum(pc.sum(pc.binary_length(table["bytes"])).as_py() for table in reader.tables(0, steps, 512))

    found = dict[str, Any]()
    assert isinstance(index.groups, RowGroups)  # as of all prepared data
    for world in (4,) if smoke else (1, 4, 8, 16):
        s3.weather[-1].calm()
        used = sum(ray.get([read.remote(rank, world) for rank in range(world)]))
        sizes = [size for path, size in s3.weather[-1].sent if "list-type" not in path]
        found[f"{world} ranks"] = {
            "bytes over used": round(sum(sizes) / used, 3),
            "requests": len(sizes),
            "row groups, and footers of all ranks": len(index.groups) + world * len(index.groups.files),
        }
    return found


def groups() -> dict[str, Any]:
    """The row groups that jobs/prepare.py makes for several numbers and sizes of images."""
    found = {}
    for rows, size in (
        (1797, 200),
        (60_000, 300),
        (50_000, 2500),
        (1_281_167, 3000),
        (1_281_167, 110_000),
        (10**8, 6000),
        (IMAGES, IMAGE_BYTES),
    ):
        each = rows_per_group(rows, rows * size)
        count = -(-rows // each)
        lanes = {batch: lanes_for(count, rows * size, batch) for batch in (256, 1024)}
        found[f"{rows:,} images of {size:,} bytes"] = {
            "rows": each,
            "groups a lane": [round(count / some, 1) for some in lanes.values()],
            "MB of a first batch": round(min(count, lanes[256]) * each * size / 1e6, 1),
        }
    return found


def mixing() -> dict[str, Any]:
    """The mean number of classes in one batch and in four, at some steps of an epoch."""
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    found = {}
    for name, rows, image_bytes, whole in (
        ("folder or tars", GROUP_ROWS, 6000, False),
        ("folder or tars, images of 110 kB", 2, 110_000, False),
        ("Parquet, row groups of 64", 64, 6000, True),
        ("Parquet, row groups of 1,000, images of 110 kB", 1000, 110_000, True),
    ):
        kept = np.random.default_rng(0).random(len(labels)) < 0.9
        sizes = np.add.reduceat(kept, np.arange(0, len(labels), rows))
        plan = Plan(sizes, 0, BATCH, lanes_for(len(sizes), image_bytes * int(kept.sum()), BATCH), whole)
        mine = labels[kept]
        steps = np.linspace(0, plan.rows // BATCH - 4, 8, dtype=int).tolist()
        some = [batch_rows(plan, step, step + 4) for step in steps]
        seen = [mine[plan.first_id[batches.group] + batches.row] for batches in some]
        found[name] = {
            "lanes": plan.lanes,
            "batch": round(float(np.mean([len(np.unique(classes[0])) for classes in seen]))),
            "four batches": round(float(np.mean([len(np.unique(classes)) for classes in seen]))),
        }
    return found


def start(ranks: int = 256, files: int = 15_259) -> dict[str, float]:
    """Measures the start, from an index to every rank's stream."""
    counts = [[1024] * 64] * (files - 1) + [[1024] * (GROUPS - 64 * (files - 1))]
    names = [f"s3://bucket/folder/data/train-{number:05d}.parquet" for number in range(files)]
    packed = row_groups(zip(names, counts, strict=True))
    index = DatasetIndex("s3://bucket/folder", "train", IMAGE, packed, "", bytes=IMAGES * IMAGE_BYTES)
    began = time.perf_counter()
    planned = share(index, plan := index.plan(0, LARGE_BATCH))
    streams = [
        cloudpickle.dumps(s["train"]) for s in PlannedData(2, False).configure({"train": planned}, ranks)
    ]
    index, plan = ray.get(cloudpickle.loads(streams[7]).planned.data)
    batch_rows(plan, 1000, 1000 + plan.steps_open, *cut(plan.batch_size, 7, ranks))
    return {
        "groups": len(packed),
        "seconds": round(time.perf_counter() - began, 2),
        "bytes of a stream": len(streams[0]),
        "bytes a group": round(index_bytes(packed) / len(packed), 1),
    }


def index_bytes(groups: RowGroups) -> int:
    """Bytes of the row groups' index in memory."""
    names = sum(map(sys.getsizeof, groups.files)) + sys.getsizeof(groups.files)
    return groups.first.nbytes + groups.ends.nbytes + names


def main(smoke: bool) -> None:
    """Prints one JSON line."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it prints each request
    with s3.s3_server("scale") as bucket:  # before Ray, whose workers inherit its address
        connect()
        found = {
            "groups": groups(), "bytes over used": reading(smoke), "S3": at_a_server(bucket, smoke),
            "classes": mixing(), "start": start(),
        }  # fmt: skip
        print(json.dumps(found))


if __name__ == "__main__":
    main("--smoke" in sys.argv)
