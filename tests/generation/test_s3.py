"""Samples on an object store: the same bytes, and the same guarantees."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from pipeline import storage
from tests.generation.common import config, digests, make
from tests.jobs.common import Outcome


def stored(uri: str) -> dict[str, str]:
    return {
        place.rpartition("/")[2]: hashlib.sha256(storage.read_bytes(place)).hexdigest()
        for place in storage.sizes(f"{uri}/data")
    }


def test_a_dataset_on_s3_is_the_one_on_disk_and_is_mended_like_it(
    bucket: str, model: Path, whole: Path
) -> None:
    output = f"{bucket}/mended"
    make(config(output), model)
    assert stored(output) == digests(whole)
    cut, lost = sorted(storage.sizes(f"{output}/data"))[:2]
    storage.write_atomic(cut, b"cut short")
    storage.remove(lost)
    storage.write_atomic(f"{output}/data/foreign.parquet", b"mine")
    assert make(config(output), model)["metrics"]["generated"] == 16
    assert stored(output) == digests(whole)
    assert make(config(output, verify=True), model)["metrics"]["verified"] == 5


def test_the_job_writes_to_s3(
    bucket: str, model: Path, whole: Path, tmp_path: Path, job: Callable[..., Outcome]
) -> None:
    done = job(
        "generate", "--model", model, "--output", f"{bucket}/job", "--count", 40, "--batch-size", 4,
        "--rows-per-file", 8, "--seed", 3, "--guidance", 1.5, "--actors", 1, home=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert done.result["count"] == 40
    assert stored(f"{bucket}/job") == digests(whole)
