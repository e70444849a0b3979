"""Measures images per second into one consumer: this project's stream, other loaders, and the decoders alone.

    python -m benchmarks.ingest [--smoke] [--peers PYTHON]

JPEG files of 64x64 and 256x256 pixels and PNG files of 32x32 become shuffled batches of uint8. Every loader has two
reading processes. This project and Hugging Face `datasets` read Parquet, torch's DataLoader reads image files,
and mosaicml-streaming and litdata read their own formats of these files. All data is in the page cache. The decoders
alone decode images in memory, in one process per core. The loaders take turns in several rounds. A ratio is computed per
round, and its median is reported. The seconds to the first batch are reported separately, and each loader has some time
to settle after it.

    python -m venv .venv-peers && .venv-peers/bin/pip install -r benchmarks/peers.txt

makes an environment for `--peers .venv-peers/bin/python`, because mosaicml-streaming and litdata need torchvision and
other versions than this project. The result names each loader that can't be measured, with the reason.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.loaders import BATCH, PROCESSES, measure
from pipeline import memory
from pipeline.cluster.session import connect
from pipeline.config import ImageConfig
from pipeline.data.groups import row_groups
from pipeline.data.index import DatasetIndex
from pipeline.data.sources.parquet import row_counts
from pipeline.data.stream import RankStream, share

ROWS_PER_GROUP = 64
SETS = (("JPEG", 64, 32_768), ("JPEG", 256, 4096), ("PNG", 32, 65_536))  # images
HERE, THERE = ("bare", "dataloader", "dataloader_fast", "huggingface"), ("mosaicml", "litdata")
NO_PEERS = "not measured: no --peers"
# Aims: smallest ratio of our rate to that of the DataLoader with Pillow and to the decoders alone, most seconds to the
# first batch, and by image size the smallest ratio to the fastest other loader.
TO_DATALOADER, TO_BARE, FIRST_BATCH = 1.2, 0.6, 2.0
TO_FASTEST = {32: 0.8, 64: 0.8, 256: 1.0}


@dataclass(frozen=True)
class Timing:
    settle: float
    count: float
    rounds: int


def picture(generator: np.random.Generator, kind: str, size: int) -> bytes:
    pixels = generator.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
    buffer, options = io.BytesIO(), {"quality": 90} if kind == "JPEG" else {}
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def write(folder: Path, kind: str, size: int, count: int) -> None:
    """Writes the same random images as files and in Parquet."""
    generator = np.random.default_rng(0)
    images = [picture(generator, kind, size) for _ in range(count)]
    for name in ("files", "parquet"):
        (folder / name).mkdir()
    for i, data in enumerate(images):
        (folder / "files" / f"{i:06d}.{kind.lower()}").write_bytes(data)
    for number in range(4):
        rows = [{"image": {"bytes": data, "path": None}, "label": 0} for data in images[number::4]]
        path = folder / "parquet" / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=ROWS_PER_GROUP, compression="none")


def ours(folder: Path, size: int) -> Iterator[int]:
    """Yields batch sizes from a RankStream, used as in a training worker."""
    memory.keep()
    files = sorted(map(str, (folder / "parquet").iterdir()))
    groups = row_groups((file, row_counts(file)) for file in files)
    held = sum(map(os.path.getsize, files))
    index = DatasetIndex(str(folder), "train", ImageConfig(size, 3), groups, "", bytes=held)
    planned = share(index, index.plan(0, BATCH))
    with closing(RankStream(planned, 0, 1, readers=PROCESSES).batches(0, 10**7)) as batches:
        for batch in batches:
            yield len(batch.images)


class Loaders:
    """The loaders of one Python environment, in a separate process; see benchmarks/loaders.py."""

    def __init__(self, python: str, names: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.loaders"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self.missing: dict[str, str] = self.ask(do="import", names=names)

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()  # the process ends when its input ends


def start(python: str, names: tuple[str, ...]) -> tuple[dict[str, Loaders], dict[str, str]]:
    """The loaders of an environment by name, and for each missing loader the reason."""
    try:
        loaders = Loaders(python, names)
    except (OSError, ValueError) as error:
        return {}, dict.fromkeys(names, f"not measured: {python}: {error}")
    why = {name: f"not measured: {reason}" for name, reason in loaders.missing.items()}
    return {name: loaders for name in names if name not in why}, why


def compare(
    kind: str, size: int, folder: Path, timing: Timing, loaders: dict[str, Loaders], why: dict[str, str]
) -> dict[str, Any]:
    about = {"folder": str(folder), "kind": kind, "settle": timing.settle, "count": timing.count}
    why = dict(why)
    for name in THERE:
        if name in loaders and (failed := loaders[name].ask(do="write", loader=name, **about).get("failed")):
            why[name] = f"not measured: writing: {failed}"
    rounds = list[dict[str, tuple[float, float]]]()
    for _ in range(timing.rounds):
        found = {"ours": measure(ours(folder, size), timing.settle, timing.count)}
        for name in [name for name in loaders if name not in why]:
            answer = loaders[name].ask(do="measure", loader=name, **about)
            if "failed" in answer:
                why[name] = f"not measured: {answer['failed']}"
            else:
                found[name] = tuple(answer["answer"])
        rounds.append(found)
    return table(size, [{n: v for n, v in found.items() if n not in why} for found in rounds]) | why


def table(size: int, rounds: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """Medians over the rounds."""
    names = list(rounds[0])
    rate = {name: statistics.median(found[name][0] for found in rounds) for name in names}

    def ratio(name: str) -> float:
        return round(statistics.median(found["ours"][0] / found[name][0] for found in rounds), 3)

    fastest = max((name for name in names if name not in ("ours", "bare")), key=lambda name: rate[name])
    first = {name: statistics.median(found[name][1] for found in rounds) for name in names if name != "bare"}
    return {
        "images/s": {name: round(value) for name, value in rate.items()},
        "first batch, s": {name: round(value, 2) for name, value in first.items()},
        "ours over": {name: ratio(name) for name in names if name != "ours"},
        "aims": {
            "over dataloader": f"{ratio('dataloader')} of {TO_DATALOADER}",
            f"over the fastest, {fastest}": f"{ratio(fastest)} of {TO_FASTEST[size]}",
            "over bare": f"{ratio('bare')} of {TO_BARE}",
            "first batch, s": f"{first['ours']:.2f} of {FIRST_BATCH}",
        },
    }


def main(arguments: argparse.Namespace) -> None:
    """Prints one JSON line."""
    smoke = arguments.smoke
    timing = Timing(0.0, 0.2, 1) if smoke else Timing(1.5, 3.0, arguments.rounds)
    loaders, why = start(sys.executable, HERE)
    if arguments.peers:
        peers, missing = start(arguments.peers, THERE)
        loaders, why = loaders | peers, why | missing
    else:
        why |= dict.fromkeys(THERE, NO_PEERS)
    began = time.perf_counter()
    connect(preload="pipeline.data.stream")
    result: dict[str, Any] = {"ray_start_seconds": round(time.perf_counter() - began, 2)}
    for kind, size, count in SETS:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), kind, size, 512 if smoke else count)
            result[f"{kind} {size}x{size}"] = compare(kind, size, Path(folder), timing, loaders, why)
            result["load"] = [round(load, 1) for load in os.getloadavg()]
    for process in set(loaders.values()):
        with suppress(OSError):
            process.close()
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="run only for seconds")
    parser.add_argument(
        "--peers", metavar="PYTHON", help="Python of the environment from benchmarks/peers.txt"
    )
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args())
