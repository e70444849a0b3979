"""The whole way over an object store: shards, checkpoints, the exported model and samples, none on a local disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data.index import open_dataset
from tests.data.common import encoded, write_folder
from tests.data.s3 import s3_server
from tests.jobs.common import run_job

SMALL = ("--model-channels", 32, "--channel-multipliers", 1, "--attention-resolutions", 4, "--timesteps", 20)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server("images") as uri:
        yield uri


@pytest.mark.system
def test_training_reads_a_folder_as_it_is(tmp_path: Path) -> None:
    """No preparing: images of any shape, one of them broken, which is counted and named."""
    folder = write_folder(tmp_path / "in", encoded(300, 20, 12))
    broken = [folder / "cat" / f"bad-{i}.png" for i in range(2)]
    for i, path in enumerate(broken):
        path.write_bytes(b"\x89PNG nothing %d" % i)
    flags = (
        "--data",
        folder,
        "--image-size",
        8,
        "--random-crop",
        "--random-flip",
        "--batch-size",
        16,
        *SMALL,
    )
    run = ("--output", tmp_path / "run", "--steps", 20, "--log-every", 20, "--max-bad-fraction", 0.1)
    done = run_job("train", *flags, *run, home=tmp_path)
    assert done.code == 0, done.stderr
    named = (tmp_path / "run" / "quarantine.jsonl").read_text()
    assert done.result["metrics"]["undecodable_images"] >= named.count("bad-") > 0
    assert "UnidentifiedImageError" in named
    assert "can't be decoded" in done.stderr
    over = run_job("train", *flags, "--output", tmp_path / "over", "--max-bad-fraction", 0.001, home=tmp_path)
    assert over.code == 2
    assert "--max-bad-fraction" in over.stderr


@pytest.mark.system
def test_prepare_train_resume_generate(s3: str, tmp_path: Path) -> None:
    for path in write_folder(tmp_path / "in", encoded(150)).rglob("*.png"):
        storage.write_atomic(f"{s3}/in/{path.relative_to(tmp_path / 'in')}", path.read_bytes())
    storage.write_atomic(f"{s3}/in/cat/bad.png", b"\x89PNG nothing")
    flags = ("--source", "folder", "--input", f"{s3}/in", "--image-size", 8, "--channels", 1)
    prepared = run_job("prepare", *flags, "--output", f"{s3}/shards", home=tmp_path)
    assert prepared.result == {"output": f"{s3}/shards", "count": 150}, prepared.stderr
    assert open_dataset(f"{s3}/shards").quarantined == 1

    run = (
        "--data",
        f"{s3}/shards",
        "--output",
        f"{s3}/run",
        "--batch-size",
        16,
        "--checkpoint-every",
        5,
        *SMALL,
    )
    first = run_job("train", *run, "--steps", 10, home=tmp_path)
    assert first.code == 0, first.stderr
    assert {"data_wait_share", "undecodable_images"} <= first.result["metrics"].keys()
    resumed = run_job("train", *run, "--steps", 20, "--resume", home=tmp_path)
    assert resumed.code == 0, resumed.stderr
    assert resumed.result["run_id"] == first.result["run_id"]
    assert any("step-000000020" in name for name in storage.list_files(f"{s3}/run/checkpoints"))

    flags = (
        "--model",
        resumed.result["model"],
        "--output",
        f"{s3}/samples",
        "--count",
        40,
        "--batch-size",
        16,
    )
    made = run_job("generate", *flags, "--sampler", "ddim", "--sampling-steps", 3, home=tmp_path)
    assert made.result.get("count") == 40, made.stderr
    assert open_dataset(f"{s3}/samples/data", image_size=8).rows > 20
    assert not (tmp_path / "s3:").exists()
