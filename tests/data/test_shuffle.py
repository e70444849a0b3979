"""The second stage of jobs/prepare.py requests only its shards' rows, counted at the server. Runs change no byte."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import kept, shuffle
from pipeline.data.images import encode_png
from pipeline.data.kept import Chunk, read_chunk, read_records, rows_between, write_chunk
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.data.shuffle import ShardTask, runs_of
from tests.data.weather import Weather

RNG = np.random.default_rng(0)


def some_chunk(output: str, rows: int, size: int) -> Chunk:
    def row(number: int) -> dict[str, object]:
        key, digest = int(RNG.integers(2**64, dtype=np.uint64)), RNG.bytes(32)
        values = {"count": 1, "sum": [1], "squares": [1], "label": "0", "path": f"{number}.png"}
        return {"key": key, "digest": digest, "pixels": digest, "image": RNG.bytes(size), **values}

    return write_chunk(output, "parts/chunk.arrow", [row(number) for number in range(rows)])


@pytest.mark.parametrize("size", [100, 3000, 60_000])
def test_rows_of_a_range_are_one_request_of_about_their_bytes(
    bucket: str, weather: Weather, size: int
) -> None:
    chunk = some_chunk(bucket, 400, size)
    keys = read_chunk(bucket, chunk.file)["key"].to_pylist()
    assert keys == sorted(keys) and len(keys) == 400
    bounds = sorted(RNG.choice(400, 12, replace=False).tolist())
    for first, last in [(0, 2**64), *((keys[a], keys[b]) for a, b in pairwise(bounds))]:
        weather.calm()
        wanted = [key for key in keys if first <= key < last]
        assert rows_between(bucket, chunk, first, last)["key"].to_pylist() == wanted
        assert [method for method, _ in weather.asked] == ["GET"]
        # The other columns take up to 400 bytes a row, and the batch at each end may be needed only in part.
        least = max(kept.BATCH_BYTES, size)
        assert weather.sent[0][1] <= (len(wanted) + 2 * (least // size + 1)) * (size + 400) + 4096
    weather.calm()
    if size > kept.BATCH_BYTES:  # each row is a batch of its own with a known key
        assert not rows_between(bucket, chunk, keys[7] + 1, keys[8]).num_rows
        assert not weather.asked


@pytest.mark.slow
@pytest.mark.usefixtures("prepared_here")
def test_runs_of_shards_share_their_requests_and_give_the_same_bytes(
    bucket: str, weather: Weather, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        image = encode_png(RNG.integers(0, 256, (32, 32, 3), np.uint8))
        (tmp_path / f"{number:03d}.png").write_bytes(image)
    found = []
    for runs in (shuffle.RUNS, 1):
        monkeypatch.setattr(shuffle, "RUNS", runs)
        output = f"{bucket}/out{runs}"
        config = PrepareConfig(output, "folder", str(tmp_path), rows_per_shard=10, image_size=32)
        weather.calm()
        manifest = prepare(config)
        chunks = sum(len(record.chunks) for record in read_records(output).values())
        shards = sum(len(split.shards) for split in manifest.splits.values())
        asked = [method for method, path in weather.asked if re.search(r"/[0-9a-f]{40}-\d+\.", path)]
        assert asked.count("PUT") == chunks >= 6 and shards >= 6
        assert len(asked) - chunks <= chunks * (shards if runs > 1 else len(manifest.splits))
        found.append({split: value.shards for split, value in manifest.splits.items()})
    assert found[0] == found[1]


def test_runs_hold_neighbours_of_one_split_and_leave_a_cluster_enough_to_do() -> None:
    def tasks(split: str, numbers: range) -> list[ShardTask]:
        return [ShardTask(split, number, 10_000, "") for number in numbers]

    given = [
        *tasks("train", range(4000)),
        *tasks("train", range(5000, 9000)),
        *tasks("validation", range(900)),
    ]
    runs = runs_of(given, shard_bytes=30 * 2**20)
    assert [task for run in runs for task in run] == given
    for run in runs:
        assert {task.split for task in run} == {run[0].split} and len(run) <= 8
        assert [task.number for task in run] == list(range(run[0].number, run[0].number + len(run)))
    assert shuffle.RUNS < len(runs) < len(given) / 7
    assert len(runs_of(given[:400], shard_bytes=1)) == 400
    assert len(runs_of(given, shard_bytes=2**40)) == len(given)
