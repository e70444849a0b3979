"""Whole searches, through Ray Tune, Optuna, Ray Train and MLflow, on a cluster of one node with two CPUs."""

import json
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from pipeline.cluster.session import connect
from pipeline.commands import cli
from pipeline.config import TrainConfig, to_dict
from pipeline.errors import InputError
from pipeline.evaluation.config import BITS_PER_DIM
from pipeline.lock import LeaseLost
from pipeline.tracking import address, runs
from pipeline.tuning import ledger
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.ledger import Record
from pipeline.tuning.search import search
from tests.data.common import leave_ray
from tests.jobs.common import database, environment
from tests.jobs.forked import ForkedJob
from tests.system.cluster import LocalCluster, local_cluster
from tests.tuning.gaussian import FailingTrial, GaussianTrial, SlowTrial, known_bound
from tests.tuning.test_proposals import FLAGS, VALUES

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Its head has the CPUs: another node would have agents of its own, and a fork server for each search."""
    # A trial needs the second module, and would import it for two seconds.
    with local_cluster(head_cpus=2, preload="pipeline.training.worker,pipeline.tuning.trial") as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, digits: Path, cluster: LocalCluster) -> Iterator[Path]:
    """A folder with prepared digits in `digits`. This process has joined the cluster."""
    home = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", database(home))
        patch.setenv("RAY_ADDRESS", cluster.address)
        connect(environment=address.environment())
        (home / "digits").symlink_to(digits)
        yield home
        leave_ray()


def configure(home: Path, name: str, space: dict[str, Any], **settings: Any) -> TuneConfig:
    (home / f"{name}.yaml").write_text(yaml.safe_dump(space))
    return TuneConfig(str(home / "digits"), str(home / name), space=str(home / f"{name}.yaml"), **settings)


def wait_for(found: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.2)
    raise AssertionError(f"no {what} within {seconds} s")


def records(config: TuneConfig) -> dict[str, Record]:
    return {record.name: record for record in ledger.read_all(config.output)}


def started(name: str, config: TuneConfig, home: Path, cluster: LocalCluster) -> ForkedJob:
    """Start the search as a job. Its stderr goes to NAME.log."""
    settings = home / f"{name}-config.yaml"
    settings.write_text(yaml.safe_dump(to_dict(config)))
    variables = environment(home, RAY_ADDRESS=cluster.address)
    files = {"stdout": home / f"{name}.stdout", "stderr": home / f"{name}.log"}
    return ForkedJob("tune", "--config", settings, cwd=home, variables=variables, **files)


def test_a_killed_search_is_moved_and_goes_on_with_more_trials(home: Path, cluster: LocalCluster) -> None:
    """After a kill of the driver no finished trial runs again and a running one continues. A bad trial fails alone."""
    # Half of this space can't be trained. Of the other half, one half hardly learns and is stopped early.
    space = {
        "batch_size": 16,
        "model.channel_multipliers": [[1]],
        "model.res_blocks": 1,
        "model.attention_resolutions": [[]],
        "diffusion.timesteps": 20,
        "optimizer.ema_decays": [[0.5]],
        "optimizer.warmup_steps": 1,
        "readers": 1,
        "peak_tflops": 1.0,
        # The channels of an attention head must divide the model's.
        "model.model_channels": [16, 24],
        "model.head_channels": [16, 24],
        "optimizer.learning_rate": [1e-8, 3e-3],
    }
    small = {"max_images": 16, "terms": 4, "cpus_per_worker": 0.5, "concurrent": 2}
    first = configure(
        home, "first", space, searcher="random", seed=7, trials=7, images=1280, rungs=3, reduction=2, **small
    )
    job = started("first", first, home, cluster)
    try:

        def in_between() -> bool:
            """Return whether one trial has ended and another one has had some, but not all, of its measurements."""
            if job.poll() is not None:
                raise AssertionError((home / "first.log").read_text()[-3000:])
            now = records(first).values()
            measured = any(r.status in ("finished", "stopped") for r in now)
            return measured and any(r.status == "running" and 1 <= len(r.rungs) <= 2 for r in now)

        wait_for(in_between, 600, "finished and half-finished trial")
    finally:
        job.kill()
    before = records(first)
    assert any(not record.over for record in before.values())
    moved = replace(first, output=str(home / "moved"), trials=9)  # one more than the space has choices
    shutil.move(first.output, moved.output)

    with pytest.raises(InputError, match="already holds a search: pass --resume"):
        search(moved)
    moved = replace(moved, resume=True)
    with pytest.raises(InputError, match="terms = 4, now it is 6"):
        search(replace(moved, terms=6))
    result = search(moved)

    after = records(moved)
    assert len(after) == 8
    for name, record in before.items():
        if record.over:
            assert after[name] == record  # including the seconds of its measurements
        else:
            assert after[name].flags == record.flags
            assert after[name].rungs[: len(record.rungs)] == record.rungs
    bad = [r for r in after.values() if r.flags["model.model_channels"] != r.flags["model.head_channels"]]
    assert all(r.status == "failed" and "does not divide" in r.reason for r in bad)
    good = [r for r in after.values() if r not in bad]
    assert len(bad) == len(good) == 4
    best = min(good, key=lambda r: r.metrics[BITS_PER_DIM])
    check_rungs(moved.output, good)
    assert not list(Path(moved.output).glob("ray-*"))

    assert best.status == "finished"
    assert result["metrics"][BITS_PER_DIM] == best.metrics[BITS_PER_DIM]
    assert result["count"] == len(good)
    page = (Path(moved.output) / "report.html").read_text()
    assert all(f'"name": "{name}"' in page for name in after)
    assert [Path(one.path).name for one in mlflow.MlflowClient().list_artifacts(result["run_id"])] == [
        "report.html",
        "trials.csv",
    ]
    check_tracking(result, after, best)
    check_command(result["command"], best)

    assert search(moved) == result  # no work is left: no new run and no new version of the model
    check_tracking(result, after, best)
    assert records(moved) == after


def test_a_search_that_is_told_to_end_leaves_no_run_running(home: Path, cluster: LocalCluster) -> None:
    space = {
        "batch_size": 16,
        "model.channel_multipliers": [[1]],
        "model.res_blocks": 1,
        "model.attention_resolutions": [[]],
        "diffusion.timesteps": 20,
        "readers": 1,
        "peak_tflops": 1.0,
        "optimizer.learning_rate": [1e-4, 1e-3],
    }
    config = configure(home, "told", space, trials=2, images=10**7, concurrent=1, cpus_per_worker=0.5)
    job = started("told", config, home, cluster)
    client = mlflow.MlflowClient(address.tracking_uri())

    def trains() -> str:
        """Return the MLflow run of a trial whose workers have begun, or ""."""
        assert job.poll() is None, (home / "told.log").read_text()[-3000:]
        begun = [one for one in ledger.read_all(config.output) if one.run_id]
        begun = [one for one in begun if (ledger.run_folder(config.output, one) / "run.json").exists()]
        return begun[0].run_id if begun else ""

    try:
        trial = wait_for(trains, 300, "trial that trains")
        parent = json.loads((home / "told" / "search.json").read_text())["run_id"]
        assert [client.get_run(run).info.status for run in (parent, trial)] == ["RUNNING", "RUNNING"]
        job.send_signal(signal.SIGTERM)
        assert job.wait(120) == 128 + signal.SIGTERM
    finally:
        job.kill()
    assert (
        (home / "told.log")
        .read_text()
        .endswith("tune: the trials so far are kept; go on with --resume\ntune: ended by SIGTERM\n")
    )
    assert [client.get_run(run).info.status for run in (parent, trial)] == ["KILLED", "KILLED"]
    found = client.search_runs([client.get_run(parent).info.experiment_id], "attributes.status = 'RUNNING'")
    assert not [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent]


def check_rungs(output: str, good: list[Record]) -> None:
    """Check that each trial left a model, and ended or was stopped at a rung at which another one was better."""
    assert {r.status for r in good} == {"finished", "stopped"}
    for record in good:
        images = [rung.images for rung in record.rungs]
        assert images == [rung.seen for rung in record.rungs] == [320, 640, 1280][: len(images)]
        assert (len(images) == 3) == (record.status == "finished")
        if record.status == "stopped":
            at_rung = [r.rungs[len(images) - 1].metrics[BITS_PER_DIM] for r in good if r.images >= images[-1]]
            assert record.metrics[BITS_PER_DIM] > min(at_rung)
        assert (ledger.run_folder(output, record) / "model").is_dir()


def check_tracking(result: dict[str, Any], after: dict[str, Record], best: Record) -> None:
    """Check one parent run, a nested run per trial with settings and measurements, and the registered winner."""
    client = mlflow.MlflowClient(address.tracking_uri())
    parent = client.get_run(result["run_id"])
    assert parent.info.status == "FINISHED"
    nested = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    by_id = {run.info.run_id: run for run in nested}
    assert set(by_id) == {record.run_id for record in after.values()}
    assert len(client.search_model_versions("name = 'tuned'")) == 1
    for record in after.values():
        run = by_id[record.run_id]
        assert run.info.status == ("FAILED" if record.status == "failed" else "FINISHED")
        assert run.data.params["optimizer.learning_rate"] == str(record.flags["optimizer.learning_rate"])
        history = client.get_metric_history(record.run_id, BITS_PER_DIM)
        assert sorted((p.step, p.value) for p in history) == [
            (r.step, r.metrics[BITS_PER_DIM]) for r in record.rungs
        ]
        if record.status == "failed":
            assert run.data.tags["ray_ddpm.reason"] == record.reason
        else:
            assert run.data.metrics["loss"] > 0
    version = client.get_model_version_by_alias("tuned", "best")
    assert version.run_id == best.run_id
    assert version.description.startswith(f"![Samples](get-artifact?path=samples.png&run_uuid={best.run_id})")
    assert (version.tags["data"], version.tags["timesteps"]) == ("digits", "20")
    assert float(version.tags[BITS_PER_DIM]) == best.metrics[BITS_PER_DIM]
    assert (parent.info.run_name, parent.data.params["data"]) == ("search digits by bits_per_dim", "digits")
    assert parent.inputs.dataset_inputs[0].dataset.name == "digits"
    assert result["model"] == f"models:/tuned/{version.version}"


def check_command(printed: str, best: Record) -> None:
    words = shlex.split(printed)
    assert words[:2] == ["python", "jobs/train.py"]
    config = cli.parse(TrainConfig, words[2:], "train", "")
    assert config.optimizer.learning_rate == best.flags["optimizer.learning_rate"]
    assert config.model.channel_multipliers == (1,)
    assert config.steps * config.batch_size == 1280


def test_the_search_finds_the_known_best_of_gaussian_data(home: Path) -> None:
    """tests/tuning/gaussian.py gives the exact bound of every choice. 14 of the 24 choices are tried."""
    space = dict(zip(FLAGS, VALUES, strict=True))
    config = configure(
        home, "gaussian", space, trials=14, concurrent=1, scheduler="none", rungs=1, seed=3, register=""
    )
    result = search(config, GaussianTrial)
    known = {
        (schedule, T, variance): known_bound(schedule, T, variance)
        for schedule in VALUES[0]
        for T in VALUES[1]
        for variance in VALUES[2]
    }
    best = min(known, key=lambda choice: known[choice])
    assert tuple(result["flags"][flag] for flag in FLAGS) == best
    assert len(records(config)) == 14
    for record in records(config).values():
        bound = known[tuple(record.flags[flag] for flag in FLAGS)]
        assert abs(record.metrics[BITS_PER_DIM] - bound) < 4 * record.metrics[f"{BITS_PER_DIM}_stderr"]


def test_a_resume_makes_another_attempt_where_the_infrastructure_failed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tuning.search.RESTARTS", 1)
    space = dict(zip(FLAGS, VALUES, strict=True))
    config = configure(home, "failing", space, trials=4, concurrent=2, rungs=1, register="")
    assert search(config, FailingTrial)["count"] == 1
    before = records(config)
    assert [r.status for r in before.values()] == ["failed", "interrupted", "interrupted", "finished"]
    assert before["0000"].reason == f"{BITS_PER_DIM} is nan after {config.images} images"
    assert "its process died" in before["0001"].reason
    assert before["0002"].reason == "OSError: the storage is away"

    (Path(config.output) / "repaired").touch()
    config = replace(config, resume=True)
    assert search(config, FailingTrial)["count"] == 3
    after = records(config)
    assert [r.status for r in after.values()] == ["failed", "finished", "finished", "finished"]
    assert all(after[name] == before[name] for name in ("0000", "0003"))
    assert all(after[name].flags == record.flags for name, record in before.items())

    note = Path(config.output) / "search.json"
    old = json.loads(note.read_text())
    note.write_text(json.dumps(old | {"fixed": old["fixed"] | {"scheduler": "pbt"}}))
    with pytest.raises(InputError, match="scheduler = pbt, which no longer exists, now it is asha"):
        search(config, FailingTrial)


def test_a_driver_that_has_lost_its_lease_stops_the_search_and_leaves_its_run_open(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.lock.RENEW_SECONDS", 0.2)
    config = configure(home, "leased", dict(zip(FLAGS, VALUES, strict=True)), trials=1, rungs=1, register="")
    with pytest.raises(LeaseLost, match="taken over by another driver"):
        search(config, SlowTrial)
    run_id = json.loads((Path(config.output) / "search.json").read_text())["run_id"]
    assert runs.open_client().get_run(run_id).info.status == "RUNNING"
