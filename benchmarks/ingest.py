"""Images per second into one consumer: this project's stream, other loaders, and the limit of the machine.

    python -m benchmarks.ingest [--smoke]

JPEG files of 64x64 and 256x256 pixels become shuffled batches of uint8, with the same decoding everywhere but in the
limit, which is Pillow alone in a loop, in one process for each core. Each loader runs by itself: the seconds to its
first batch are reported apart, then it is left to settle, then it is counted. The loaders take turns in several
rounds; medians are compared. PyTorch's DataLoader has its images in memory already; the others read Parquet.
"""

import functools
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

from pipeline.cluster.session import connect
from pipeline.config import ImageConfig
from pipeline.data.groups import row_groups
from pipeline.data.images import decode
from pipeline.data.index import DatasetIndex
from pipeline.data.sources.parquet import row_counts
from pipeline.data.stream import RankStream, share

PROCESSES = 2
BATCH = 128
ROWS_PER_GROUP = 64


@dataclass(frozen=True)
class Timing:
    settle: float
    count: float
    rounds: int


def jpegs(count: int, size: int) -> list[bytes]:
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        pixels = rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=90
        )
        found.append(buffer.getvalue())
    return found


def write(folder: Path, images: list[bytes]) -> None:
    for number in range(4):
        rows = [{"image": {"bytes": data, "path": None}, "label": 0} for data in images[number::4]]
        path = folder / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=ROWS_PER_GROUP, compression="none")


def ours(folder: Path, size: int) -> Iterator[int]:
    """RankStream as a training worker uses it."""
    files = sorted(map(str, folder.glob("*.parquet")))
    groups = row_groups((file, row_counts(file)) for file in files)
    held = sum(map(os.path.getsize, files))
    index = DatasetIndex(str(folder), "train", ImageConfig(size, 3), groups, "", bytes=held)
    planned = share(index, index.plan(0, BATCH))
    with closing(RankStream(planned, 0, 1, readers=PROCESSES).batches(0, 10**7)) as batches:
        for batch in batches:
            yield len(batch.images)


class InMemory(Dataset[np.ndarray]):
    def __init__(self, images: list[bytes], size: int) -> None:
        self._images, self._size = images, size

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> np.ndarray:
        return decode(self._images[i], self._size, 3)


def torch_loader(images: list[bytes], size: int) -> Iterator[int]:
    """torch.utils.data.DataLoader with worker processes; one endless epoch."""
    data = InMemory(images, size)
    sampler = RandomSampler(data, replacement=True, num_samples=10**8)
    for batch in DataLoader(data, BATCH, sampler=sampler, num_workers=PROCESSES, prefetch_factor=4):
        yield len(batch)


def collate(rows: list[dict[str, Any]], size: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([decode(row["image"]["bytes"], size, 3) for row in rows]))


def hugging_face(folder: Path, size: int) -> Iterator[int]:
    """datasets, streaming, in a DataLoader with worker processes."""
    files = sorted(map(str, folder.glob("*.parquet")))
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    shuffled = stream.shuffle(seed=0, buffer_size=1024).repeat(None)
    loader = DataLoader(
        shuffled,
        BATCH,
        num_workers=PROCESSES,
        prefetch_factor=4,
        collate_fn=functools.partial(collate, size=size),
    )
    for batch in loader:
        yield len(batch)


def decode_loop(images: list[bytes], stop: float, done: Any) -> None:
    count = 0
    for data in itertools.cycle(images):
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        count += 1
        if time.time() > stop:
            break
    done.put(count)


def limit(images: list[bytes], seconds: float) -> float:
    """Images per second of Pillow alone."""
    context = multiprocessing.get_context("fork")
    done, stop = context.Queue(), time.time() + seconds
    processes = [context.Process(target=decode_loop, args=(images, stop, done)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    total = sum(done.get() for _ in processes)
    for process in processes:
        process.join()
    return total / seconds


def measure(counts: Iterator[int], timing: Timing) -> tuple[float, float]:
    """Images per second after start-up, and the seconds to the first batch."""
    began = time.perf_counter()
    with closing(counts):  # type: ignore[type-var]
        next(counts)
        started = time.perf_counter()
        while time.perf_counter() < started + timing.settle:
            next(counts)
        counted, seen = time.perf_counter(), 0
        while (now := time.perf_counter()) < counted + timing.count:
            seen += next(counts)
    return seen / (now - counted), started - began


def compare(size: int, images: list[bytes], folder: Path, timing: Timing) -> dict[str, Any]:
    loaders = {
        "ours": lambda: ours(folder, size),
        "dataloader": lambda: torch_loader(images, size),
        "huggingface": lambda: hugging_face(folder, size),
    }
    rates: dict[str, list[float]] = {name: [] for name in (*loaders, "limit")}
    starts: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(timing.rounds):
        for name, make in loaders.items():
            rate, start = measure(make(), timing)
            rates[name].append(rate)
            starts[name].append(start)
        rates["limit"].append(limit(images, timing.count))
    rate = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "images_per_second": {name: round(value) for name, value in rate.items()},
        "startup_seconds": {name: round(statistics.median(v), 2) for name, v in starts.items()},
        "ratio_to_dataloader": round(rate["ours"] / rate["dataloader"], 3),
        "ratio_to_huggingface": round(rate["ours"] / rate["huggingface"], 3),
        "ratio_to_limit": round(rate["ours"] / rate["limit"], 3),
    }


def main(smoke: bool) -> None:
    """Prints one JSON line."""
    timing = Timing(0.2, 0.5, 1) if smoke else Timing(2.0, 5.0, 2)
    datasets.disable_progress_bars()
    began = time.perf_counter()
    connect()
    result: dict[str, Any] = {"ray_start_seconds": round(time.perf_counter() - began, 2)}
    for size, count in ((64, 8192), (256, 2048)):
        with tempfile.TemporaryDirectory() as folder:
            images = jpegs(count // 8 if smoke else count, size)
            write(Path(folder), images)
            result[f"{size}x{size}"] = compare(size, images, Path(folder), timing)
    print(json.dumps(result))


if __name__ == "__main__":
    main("--smoke" in sys.argv)
