"""A dataset is made exactly once, byte for byte, by any number of actors, after any interruption."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import datasets
import pytest
import webdataset

from pipeline.errors import InputError
from pipeline.generation.config import GenerateConfig
from pipeline.generation.job import generate
from tests.jobs.common import command, environment

pytestmark = pytest.mark.usefixtures("cluster")


def config(output: Path, **changes: object) -> GenerateConfig:
    base = GenerateConfig(
        model="m", output=str(output), count=40, batch_size=4, rows_per_file=8, seed=3, guidance=1.5, actors=2
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def make(settings: GenerateConfig, model: Path) -> dict:  # type: ignore[type-arg]
    return generate(settings, str(model), "models:/m/1")


def digests(output: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((output / "data").iterdir())}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "samples"
    assert make(config(output), model)["count"] == 40
    return output


def test_one_actor_writes_the_same_bytes_as_two(model: Path, whole: Path, tmp_path: Path) -> None:
    make(config(tmp_path, actors=1), model)
    assert digests(tmp_path) == digests(whole)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert {f["file"]: f["sha256"] for f in manifest["files"]} == digests(whole)


def test_huggingface_datasets_opens_it_as_it_is(whole: Path) -> None:
    data = datasets.load_dataset(str(whole), split="train")
    assert list(data["index"]) == list(range(40))
    assert data[0]["image"].size == (8, 8)
    assert data.features["label"].names == ["a", "b", "c"]
    assert len(set(data["label"])) == 3


def test_a_second_run_rewrites_nothing_and_mends_what_is_cut_or_lost(model: Path, whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (whole / "data").iterdir()}
    expected = digests(whole)
    assert make(config(whole), model)["metrics"]["generated"] == 0
    assert {p: p.stat().st_mtime_ns for p in (whole / "data").iterdir()} == before
    cut, lost = sorted(before)[:2]
    cut.write_bytes(cut.read_bytes()[:100])
    lost.unlink()
    assert make(config(whole), model)["metrics"]["generated"] == 16
    assert digests(whole) == expected
    kept = sorted(before)[2:]
    assert {p: p.stat().st_mtime_ns for p in kept} == {p: before[p] for p in kept}


def test_a_smaller_count_is_a_prefix_and_raising_it_only_adds(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    make(config(tmp_path, count=21), model)
    first = digests(tmp_path)
    make(config(tmp_path, count=40), model)
    assert first.items() <= digests(tmp_path).items()
    rows = [list(datasets.load_dataset(str(p), split="train").sort("index")) for p in (tmp_path, whole)]
    assert [r["image"].tobytes() for r in rows[0]] == [r["image"].tobytes() for r in rows[1]]


def test_webdataset_reads_the_tars_and_they_are_the_same_every_time(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(config(tmp_path / name, format="webdataset"), model)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    tars = [str(p) for p in sorted((tmp_path / "a" / "data").iterdir())]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("pil"))
    assert len(samples) == 40
    assert samples[5]["json"]["index"] == 5


def test_another_setting_for_the_same_output_is_refused_by_name(model: Path, whole: Path) -> None:
    with pytest.raises(InputError, match="seed = 3, now it is 4"):
        make(config(whole, seed=4), model)


def test_a_second_driver_is_refused_and_a_dead_ones_lock_taken_over(model: Path, whole: Path) -> None:
    lock = whole / "lock.json"
    host = os.uname().nodename
    lock.write_text(json.dumps({"owner": "x", "host": host, "pid": os.getpid(), "time": time.time()}))
    with pytest.raises(InputError, match="is being written by process"):
        make(config(whole), model)
    lock.write_text(json.dumps({"owner": "x", "host": host, "pid": 2**22 + 1, "time": time.time()}))
    make(config(whole), model)
    assert not lock.exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"count": 0}, "--count"),
        ({"rows_per_file": 6}, "--rows-per-file"),
        ({"sampling_steps": 5}, "T = 4"),
        ({"labels": (3,)}, "--labels 3"),
        ({"eta": 2.0}, "--eta"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    changes: dict[str, object], named: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=named):
        make(config(tmp_path, **changes), model)


@pytest.mark.system
def test_a_killed_driver_leaves_what_the_next_one_finishes(model: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "samples"
    flags = [
        "--model", model, "--output", output, "--count", 400, "--batch-size", 4, "--rows-per-file", 8,
        "--seed", 3, "--guidance", 1.5, "--actors", 1,
    ]  # fmt: skip
    driver = subprocess.Popen(
        command("generate", *flags),
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not list(output.glob("notes/*.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    before = {p: p.stat().st_mtime_ns for p in (output / "data").glob("*.parquet")}
    assert 0 < len(before) < 50
    made = make(config(output, count=400), model)["metrics"]["generated"]
    noted = {p for p in before if p.stat().st_mtime_ns == before[p]}
    assert made <= 400 - 8 * len(noted)
    assert digests(whole).items() <= digests(output).items()
    assert len(digests(output)) == 50
