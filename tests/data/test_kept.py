"""Chunks of decoded images: a shard reads its rows by one request, with few other bytes at the ends."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import kept
from pipeline.data.shuffle import ShardTask, runs_of


def rows(count: int, size: int) -> list[dict[str, object]]:
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 2**64, count, dtype=np.uint64)
    return [
        {"key": int(key), "path": f"{n:05d}", "label": str(n % 3), "digest": bytes(32), "pixels": bytes(32), "count": 4,
         "sum": [1], "squares": [1], "image": generator.bytes(size)}
        for n, key in enumerate(keys)
    ]  # fmt: skip


def test_rows_of_a_shard_are_read_by_one_request_of_about_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, asked = rows(600, 3000), list[tuple[int, int]]()
    chunk = kept.write_chunk(str(tmp_path), "a.arrow", given)
    length = (tmp_path / "a.arrow").stat().st_size
    read = kept.read_stretch
    monkeypatch.setattr(kept, "read_stretch", lambda uri, a, b: asked.append((a, b)) or read(uri, a, b))
    found = list[dict[str, object]]()
    for number in range(20):
        task = ShardTask("train", number, 20, "")
        asked.clear()
        table = kept.rows_between(str(tmp_path), chunk, *task.keys)
        assert len(asked) == 1
        # A shard is a twentieth of the chunk. The request may include one batch more at each end.
        assert asked[0][1] - asked[0][0] < length / 20 * 1.7 + 2 * kept.BATCH_BYTES
        assert all(task.keys[0] <= key < task.keys[1] for key in table["key"].to_pylist())
        found += table.to_pylist()
    assert sorted(found, key=lambda row: str(row["path"])) == given
    asked.clear()
    least = min(int(row["key"]) for row in given)  # type: ignore[call-overload]
    assert not kept.rows_between(str(tmp_path), chunk, 0, least).num_rows
    assert not asked


def test_a_run_of_shards_is_one_task_where_there_are_many() -> None:
    few = [ShardTask("train", number, 40, "") for number in range(40)]
    assert runs_of(few, 10**6) == [(task,) for task in few]
    many = [ShardTask("train", number, 10_000, "") for number in range(10_000)]
    runs = runs_of(many, 2**20)
    assert [task for run in runs for task in run] == many
    assert len(runs) <= 1.1 * 256
    # A shard that is already written ends a run.
    missing = [task for task in many if task.number % 100]
    assert all(b.number == a.number + 1 for run in runs_of(missing, 2**20) for a, b in pairwise(run))
