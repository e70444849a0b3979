"""Everything logged reaches MLflow exactly once, whatever the server does meanwhile."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow as client_library
import pytest

from pipeline import storage
from pipeline.errors import InputError
from pipeline.models.export import save_model
from pipeline.tracking import Point, runs
from pipeline.tracking.tracker import FOLDER, Tracker
from tests.data.weather import FAULTS, LOST, Weather
from tests.evaluation.common import small_model

CURVES = ("loss", "bits_per_dim")
FOREVER = 1e9


def points(*steps: int, name: str = "loss", run: int = 0) -> list[Point]:
    """Return points of a curve. Another `run` gives the same steps other times, as a second attempt does."""
    return [(1_000_000 + 1000 * run + step, step, {name: step / 2, "rate": 0.1}) for step in steps]


def all_requests(method: str, path: str) -> bool:
    return True


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def run(mlflow: Weather) -> runs.Run:
    return runs.start_run("e", "r", {})


def open_tracker(run: runs.Run, output: str, said: list[str] | None = None, seconds: float = 0.0) -> Tracker:
    say = [].append if said is None else said.append
    return Tracker(run, output, CURVES, seconds, say, threading.Event())


def curve(run: runs.Run, name: str) -> list[tuple[int, float]]:
    return sorted((p.step, p.value) for p in runs.open_client().get_metric_history(run.id, name))


def expected(*steps: int) -> list[tuple[int, float]]:
    return [(step, step / 2) for step in steps]


def wait_until(ready: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, LOST])
def test_all_of_it_arrives_once_after_an_outage(
    run: runs.Run, mlflow: Weather, output: str, fault: str
) -> None:
    storage.write_atomic(f"{output}/nonfinite/step.json", b"{}")
    said: list[str] = []
    mlflow.storm(fault, 2.0, all_requests)
    with open_tracker(run, output, said, seconds=60) as tracker:
        tracker.log_params({"batch_size": 4, "model": {"channels": 32}})
        for step in range(20):
            tracker.log_points(points(step))
        tracker.log_points(points(5, 10, name="bits_per_dim"))
        tracker.log_file("nonfinite/step.json")
        tracker.log_config({"steps": 20})
        tracker.end(reason="done")
    assert mlflow.seen > 0
    stored = runs.open_client().get_run(run.id)
    assert curve(run, "loss") == expected(*range(20))
    assert curve(run, "bits_per_dim") == expected(5, 10)
    assert stored.data.params == {"batch_size": "4", "model.channels": "32"}
    assert stored.info.status == "FINISHED"
    files = runs.open_client().list_artifacts(run.id)
    assert sorted(file.path for file in files) == ["config.yaml", "nonfinite"]
    assert not (Path(output) / FOLDER).exists()
    assert len(said) == 1
    assert "does not take" in said[0]


def test_what_was_not_delivered_is_kept_and_the_next_job_delivers_it(
    run: runs.Run, mlflow: Weather, output: str
) -> None:
    said: list[str] = []
    with open_tracker(run, output, said, seconds=30) as tracker:
        tracker.log_points(points(1, 2))
    mlflow.storm("503", FOREVER, all_requests)
    with open_tracker(run, output, said, seconds=0.5) as tracker:
        tracker.log_points(points(3, 4))
        tracker.log_points(points(2, name="bits_per_dim"))
        tracker.end("KILLED")
    assert [line.partition(":")[0] for line in said[1:]] == ["MLflow did not take everything (points, end)"]
    assert "--resume delivers it" in said[-1]

    # MLflow is still unavailable at the resume, so the points that it already has are unknown.
    resumed = runs.reopen_later(run.id, CURVES)
    assert resumed is not None
    assert resumed.last_steps is None
    with open_tracker(resumed, output, seconds=0.5) as tracker:
        assert tracker.last_steps == {"loss": 4, "bits_per_dim": 2}
        # The resumed run repeats the steps after the checkpoint of step 1, then makes new ones.
        tracker.log_points(points(2, 3, 4, run=1))
        tracker.log_points(points(5, 6, run=1))

    mlflow.calm()
    resumed = runs.reopen_later(run.id, CURVES)
    assert resumed is not None
    assert resumed.last_steps == {"loss": 2, "bits_per_dim": -1}
    with open_tracker(resumed, output, seconds=30) as tracker:
        tracker.log_points(points(6, 7, run=2))
        tracker.end()
    assert curve(run, "loss") == expected(*range(1, 8))
    assert curve(run, "bits_per_dim") == expected(2)
    # The first job's end doesn't overwrite the last job's.
    assert runs.open_client().get_run(run.id).info.status == "FINISHED"
    assert not list(Path(output).glob(f"{FOLDER}/*"))


def test_a_job_that_is_killed_in_an_outage_has_kept_every_point(
    run: runs.Run, mlflow: Weather, output: str
) -> None:
    mlflow.storm("refused", FOREVER, all_requests)
    first = open_tracker(run, output)
    first.log_points(points(1))
    wait_until(lambda: list(Path(output).glob(f"{FOLDER}/*")))
    first.log_points(points(2))
    kept = [path.read_bytes() for path in sorted(Path(output).glob(f"{FOLDER}/*"))]
    assert len(kept) == 2
    first.lost.set()  # as if the job had died
    with open_tracker(run, output, seconds=30) as tracker:
        mlflow.calm()
        tracker.log_points(points(3))
    assert curve(run, "loss") == expected(1, 2, 3)


def test_a_run_that_is_away_is_not_one_that_is_gone(mlflow: Weather, run: runs.Run, output: str) -> None:
    mlflow.storm("503", FOREVER, all_requests)
    assert runs.reopen_later(run.id, CURVES) == runs.Run(run.id, None)
    with pytest.raises(InputError, match=r"^MLflow at http\S+ does not answer, for 1 s now"):
        runs.wait_for_mlflow(lambda: runs.reopen_run(run.id, CURVES), 1.0)
    mlflow.calm()
    runs.open_client().delete_run(run.id)
    assert runs.reopen_later(run.id, CURVES) is None
    assert runs.reopen_later("0" * 32, CURVES) is None
    # A run that proves missing later loses nothing: the next job opens another run.
    said: list[str] = []
    with open_tracker(runs.Run(run.id, None), output, said, seconds=0.5) as tracker:
        tracker.log_points(points(1))
    assert f"no longer has run {run.id}" in said[0]
    other = runs.start_run("e", "r", {})
    with open_tracker(other, output, seconds=30) as tracker:
        tracker.log_points(points(2))
    assert curve(other, "loss") == expected(1, 2)


def test_a_storm_at_the_start_is_waited_for_and_said(
    mlflow: Weather, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow.storm("refused", 2.0, all_requests)
    run = runs.wait_for_mlflow(lambda: runs.start_run("e", "r", {}), 30.0)
    assert runs.open_client().get_run(run.id).info.status == "RUNNING"
    assert "does not answer" in capsys.readouterr().err


def test_what_mlflow_refuses_does_not_hold_up_the_rest(run: runs.Run, output: str) -> None:
    said: list[str] = []
    with open_tracker(run, output, said, seconds=30) as tracker:
        tracker.log_points([(1, 1, {"loss": 1.0, "no\nname": 2.0})])
        tracker.log_points(points(2))
    assert curve(run, "loss") == expected(2)
    assert said[0].startswith("MLflow refuses points: ")


@pytest.mark.slow
def test_a_job_that_does_not_wait_still_gives_mlflow_the_time_that_it_needs(
    run: runs.Run, output: str, exported: str
) -> None:
    said: list[str] = []
    with open_tracker(run, output, said, seconds=0.0) as tracker:
        tracker.log_points(points(1))
        tracker.log_model(exported, "odd (name) + more", "best")
        tracker.end()
    assert (said, tracker.model) == ([], "models:/odd (name) + more/1")
    assert runs.open_client().get_run(run.id).info.status == "FINISHED"


def test_a_file_that_is_gone_holds_up_nothing(run: runs.Run, output: str) -> None:
    said: list[str] = []
    with open_tracker(run, output, said, seconds=30) as tracker:
        tracker.log_file("gone.png")
        tracker.log_config({"steps": 1})
    assert [line.partition(": ")[2] for line in said] == ["MLflow does not get it"]
    assert [file.path for file in runs.open_client().list_artifacts(run.id)] == ["config.yaml"]


def test_where_the_output_is_away_too_each_attempt_writes_once(
    run: runs.Run, mlflow: Weather, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second write is avoided because each may hang for minutes."""
    mlflow.storm("503", FOREVER, all_requests)
    writes: list[str] = []

    def fail(uri: str, data: bytes) -> None:
        writes.append(uri)
        raise OSError("away")

    monkeypatch.setattr(storage, "write_atomic", fail)
    said: list[str] = []
    tracker = open_tracker(run, output, said)
    for step in range(50):
        tracker.log_points(points(step))
    before = len(writes)
    tracker.close()
    assert len(writes) <= before + 3
    assert "can't be written" in said[-1]


def test_artifacts_that_fail_do_not_hold_up_the_curve(run: runs.Run, mlflow: Weather, output: str) -> None:
    storage.write_atomic(f"{output}/samples.png", b"picture")
    mlflow.storm("503", FOREVER, lambda method, path: "artifacts" in path)
    with open_tracker(run, output, seconds=0.5) as tracker:
        tracker.log_file("samples.png")
        tracker.log_points(points(1))
        tracker.end()
    assert curve(run, "loss") == expected(1)
    assert runs.open_client().get_run(run.id).info.status == "FINISHED"
    mlflow.calm()
    with open_tracker(run, output, seconds=30):
        pass
    assert [file.path for file in runs.open_client().list_artifacts(run.id)] == ["samples.png"]


def test_a_driver_that_lost_its_output_delivers_and_keeps_nothing(run: runs.Run, output: str) -> None:
    with open_tracker(run, output, seconds=30) as tracker:
        tracker.log_points(points(1))
        wait_until(lambda: curve(run, "loss"))
        tracker.lost.set()
        tracker.log_points(points(2))
        tracker.end()
    assert curve(run, "loss") == expected(1)
    assert runs.open_client().get_run(run.id).info.status == "RUNNING"
    assert not Path(output).exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    model, spec = small_model(timesteps=4)
    return str(save_model(tmp_path_factory.mktemp("exported") / "model", model.state_dict(), spec))


@pytest.mark.slow
def test_a_model_is_logged_once_and_may_be_registered_later(
    run: runs.Run, mlflow: Weather, output: str, exported: str
) -> None:
    def logged() -> list[str]:
        found = client_library.search_logged_models(["1"], output_format="list")
        return [model.model_id for model in found if model.source_run_id == run.id]

    mlflow.storm("refused", 3.0, lambda method, path: method == "PUT")  # artifacts
    with open_tracker(run, output, seconds=60) as tracker:
        tracker.log_model(exported, "", "")
    (first,) = [model for model in logged() if f"models:/{model}" == tracker.model]
    for version in ("models:/later/1", "models:/later/1"):
        with open_tracker(run, output, seconds=60) as tracker:
            tracker.log_model(exported, "later", "best")
        assert tracker.model == version
    client = runs.open_client()
    version = client.get_model_version_by_alias("later", "best")
    assert (version.source, version.run_id) == (f"models:/{first}", run.id)


def _use(uri: str, ready: Any, failures: Any) -> None:
    import os

    os.environ["MLFLOW_TRACKING_URI"] = uri
    ready.wait()
    try:
        runs.start_run("shared", "", {})
    except Exception as error:
        failures.put(repr(error))


@pytest.mark.slow
def test_many_processes_may_use_a_new_database_first(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    uri = f"sqlite:///{tmp_path}/deep/new.db"
    ready, failures = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_use, args=(uri, ready, failures)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert failures.empty(), failures.get()
    client = client_library.MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'shared'")
    assert len(client.search_runs([experiment.experiment_id])) == 4


def test_a_damaged_kept_item_does_not_hold_up_the_others(run: runs.Run, output: str) -> None:
    for number, content in enumerate(('{"kind": "poi', '{"kind": "points"}', "[]"), start=1):
        storage.write_atomic(f"{output}/{FOLDER}/{number:06d}.json", content.encode())
    storage.write_atomic(f"{output}/{FOLDER}/notes.json", b"{}")
    said: list[str] = []
    with open_tracker(run, output, said, seconds=30) as tracker:
        tracker.log_points(points(1))
    assert [line.partition(" is damaged: ")[2] for line in said] == ["MLflow does not get it"] * 4
    assert curve(run, "loss") == expected(1)
