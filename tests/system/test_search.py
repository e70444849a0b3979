"""Whole searches, through Ray Tune, Optuna, Ray Train and MLflow, on a cluster of one node with two CPUs."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from pipeline.cluster.session import connect
from pipeline.config import TrainConfig
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.evaluation.config import BITS_PER_DIM
from pipeline.tracking import runs
from pipeline.tuning import ledger
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.ledger import Record
from pipeline.tuning.search import search
from tests.jobs.common import command, environment, run_job
from tests.system.cluster import LocalCluster, local_cluster
from tests.tuning.gaussian import GaussianTrial, known_bound
from tests.tuning.test_proposals import FLAGS, VALUES

pytestmark = pytest.mark.system

TINY = {
    "batch_size": 32,
    "model.model_channels": 32,
    "model.res_blocks": 1,
    "model.attention_resolutions": [[]],
    "diffusion.timesteps": 20,
    "optimizer.ema_decays": [[0.9]],
    "groups_per_window": 4,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(2) as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, cluster: LocalCluster) -> Path:
    """A folder with prepared digits in `digits`."""
    home = tmp_path_factory.mktemp("search")
    outcome = run_job("prepare", "--output", home / "digits", home=home, RAY_ADDRESS=cluster.address)
    assert outcome.code == 0, outcome.stderr
    return home


def wait_for(found: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.2)
    raise AssertionError(f"no {what} within {seconds} s")


def records(output: Path) -> list[Record]:
    return ledger.read_all(str(output))


def flags_of(home: Path, name: str, space: dict[str, Any], *more: object) -> tuple[object, ...]:
    (home / f"{name}.yaml").write_text(yaml.safe_dump(TINY | space))
    small = ("--max-images", 16, "--terms", 4, "--cpus-per-worker", 0.5, "--concurrent", 2)
    return ("--data", home / "digits", "--space", home / f"{name}.yaml", *small, *more)


def test_a_killed_search_is_moved_and_goes_on_with_more_trials(home: Path, cluster: LocalCluster) -> None:
    """Kill of the driver; no finished trial again, a running one from where it was; a bad trial ends alone."""
    # One trial of this space is finished soon, one that can't be trained fails, one takes long.
    space = {
        "model.channel_multipliers": [[1], [1, 1, 1, 1, 1]],
        "diffusion.schedule": ["linear", "cosine"],
        "optimizer.learning_rate": {"low": 0.001, "high": 0.002},
    }
    flags = flags_of(
        home, "space", space, "--images", 640, "--rungs", 3, "--reduction", 2, "--scheduler", "none"
    )
    first, moved = home / "first", home / "moved"
    job = subprocess.Popen(
        command("tune", *flags, "--output", first, "--trials", 6),
        cwd=home,
        env=environment(home, RAY_ADDRESS=cluster.address),
        stdout=subprocess.DEVNULL,
        stderr=(home / "first.log").open("w"),
        start_new_session=True,
    )
    try:

        def in_between() -> list[Record]:
            """One trial is finished and another has been measured once of three times."""
            if job.poll() is not None:
                raise AssertionError((home / "first.log").read_text()[-3000:])
            now = records(first)
            finished = any(r.status == "finished" for r in now)
            return now if finished and any(len(r.rungs) == 1 and r.status == "running" for r in now) else []

        wait_for(in_between, 300, "finished and half-finished trial")
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    before = {record.name: record for record in records(first)}
    assert any(not record.over for record in before.values())
    shutil.move(first, moved)

    again = ("tune", *flags, "--output", moved)
    assert (
        run_job(*again, "--trials", 7, home=home, RAY_ADDRESS=cluster.address).code == 2
    )  # a search lies there
    other = run_job(*again, "--trials", 7, "--resume", "--terms", 6, home=home, RAY_ADDRESS=cluster.address)
    assert other.code == 2
    assert "terms was 4" in other.stderr
    outcome = run_job(*again, "--trials", 7, "--resume", home=home, RAY_ADDRESS=cluster.address, timeout=500)
    assert outcome.code == 0, outcome.stderr[-3000:]

    after = {record.name: record for record in records(moved)}
    assert len(after) == 7
    assert all(record.over for record in after.values())
    for name, record in before.items():
        if record.over:
            assert after[name] == record  # to the second of its measurements
        else:
            assert after[name].flags == record.flags
            assert after[name].rungs[: len(record.rungs)] == record.rungs
    bad = [r for r in after.values() if r.flags["model.channel_multipliers"] != [1]]
    good = [r for r in after.values() if r not in bad]
    assert good
    assert all(r.status == "finished" and [rung.images for rung in r.rungs] == [160, 320, 640] for r in good)
    assert all(r.status == "failed" and "16" in r.reason for r in bad)
    assert not list(moved.glob("ray-*"))

    result = outcome.result
    best = min(good, key=lambda r: r.metrics[BITS_PER_DIM])
    assert result["metrics"][BITS_PER_DIM] == best.metrics[BITS_PER_DIM]
    assert result["count"] == len(good)
    assert (moved / "report.html").stat().st_size > 50_000
    check_tracking(home, result, after, best)
    check_command(result["command"], best)


def check_tracking(home: Path, result: dict[str, Any], after: dict[str, Record], best: Record) -> None:
    """One parent run, a nested run a trial with its settings and measurements, the winner registered."""
    import mlflow

    client = mlflow.MlflowClient(environment(home)["MLFLOW_TRACKING_URI"])
    parent = client.get_run(result["run_id"])
    assert parent.info.status == "FINISHED"
    runs = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    by_id = {run.info.run_id: run for run in runs}
    assert set(by_id) == {record.run_id for record in after.values()}
    for record in after.values():
        run = by_id[record.run_id]
        assert run.info.status == ("FINISHED" if record.status == "finished" else "FAILED")
        assert run.data.params["optimizer.learning_rate"] == str(record.flags["optimizer.learning_rate"])
        history = client.get_metric_history(record.run_id, BITS_PER_DIM)
        assert sorted((p.step, p.value) for p in history) == [
            (r.step, r.metrics[BITS_PER_DIM]) for r in record.rungs
        ]
        if record.status == "finished":
            assert run.data.metrics["loss"] > 0
        else:
            assert run.data.tags["ray_ddpm.reason"] == record.reason
    version = client.get_model_version_by_alias("tuned", "best")
    assert version.run_id == best.run_id
    assert result["model"] == f"models:/tuned/{version.version}"


def check_command(printed: str, best: Record) -> None:
    import shlex

    from pipeline.commands import cli

    words = shlex.split(printed)
    assert words[:2] == ["python", "jobs/train.py"]
    config = cli.parse(TrainConfig, words[2:], "train", "")
    assert config.optimizer.learning_rate == best.flags["optimizer.learning_rate"]
    assert config.diffusion.schedule == best.flags["diffusion.schedule"]
    assert config.steps * config.batch_size == 640


def test_population_based_training_copies_the_strong_over_the_weak(home: Path, cluster: LocalCluster) -> None:
    space = {"model.channel_multipliers": [[1]], "optimizer.learning_rate": [1e-7, 3e-3], "warmup_steps": 1}
    flags = flags_of(home, "pbt", space, "--images", 800, "--rungs", 5, "--scheduler", "pbt", "--trials", 2)
    outcome = run_job(
        "tune", *flags, "--output", home / "pbt", home=home, RAY_ADDRESS=cluster.address, timeout=500
    )
    assert outcome.code == 0, outcome.stderr[-3000:]
    found = records(home / "pbt")
    assert [record.status for record in found] == ["finished", "finished"]
    (weak,) = [record for record in found if record.parameters["optimizer.learning_rate"] == "1e-07"]
    (strong,) = [record for record in found if record is not weak]
    assert any(f"weights of trial {strong.name}" in note for note in weak.history)
    # An untrained model's bits/dim doesn't move; what it took over does.
    assert weak.rungs[-1].metrics[BITS_PER_DIM] < weak.rungs[0].metrics[BITS_PER_DIM] - 0.1
    assert all(record.images == 800 for record in found)


def test_the_search_finds_the_known_best_of_gaussian_data(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bound is known (see tests/tuning/gaussian.py); 14 of the 24 choices are tried."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    (tmp_path / "space.yaml").write_text(json.dumps(dict(zip(FLAGS, VALUES, strict=True))))
    connect(environment={"MLFLOW_TRACKING_URI": runs.tracking_uri()})
    try:
        prepare(PrepareConfig(output=str(tmp_path / "digits")))
        config = TuneConfig(
            data=str(tmp_path / "digits"),
            output=str(tmp_path / "search"),
            space=str(tmp_path / "space.yaml"),
            trials=14,
            concurrent=1,
            scheduler="none",
            rungs=1,
            seed=3,
            register="",
        )
        result = search(config, GaussianTrial)
    finally:
        ray.shutdown()
    known = {
        (schedule, T, variance): known_bound(schedule, T, variance)
        for schedule in VALUES[0]
        for T in VALUES[1]
        for variance in VALUES[2]
    }
    best = min(known, key=lambda choice: known[choice])
    assert tuple(result["flags"][flag] for flag in FLAGS) == best
    for record in records(tmp_path / "search"):
        bound = known[tuple(record.flags[flag] for flag in FLAGS)]
        assert abs(record.metrics[BITS_PER_DIM] - bound) < 4 * record.metrics[f"{BITS_PER_DIM}_stderr"]
