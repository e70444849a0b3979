"""A trial's record after a failure, and in another attempt."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.train import WorkerGroupError

from pipeline.errors import BadSettings, InputError, Outage
from pipeline.evaluation.config import BITS_PER_DIM
from pipeline.tracking import address
from pipeline.tuning import ledger, trial
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.ledger import Record, Rung
from pipeline.tuning.trial import FAILED, IMAGES, SEEN, Trial

TRACEBACK = (
    'Traceback (most recent call last):\n  File "x.py", line 3\nOSError: s3://user:secret@host is away'
)
Attempt = Callable[..., Trial]


def rung(images: int, value: float = 3.0) -> Rung:
    return Rung(images, images // 10, images / 7, {BITS_PER_DIM: value}, (value, value / 3))


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """A function that starts trial 0 of a search of 900 images. The trial follows a script of rungs and errors."""
    monkeypatch.setattr(trial, "connect", lambda: None)
    ledger.write(str(tmp_path), Record(0, {}, {}))

    def start(*script: Rung | Exception) -> Trial:
        steps = iter(script)

        class Scripted(Trial):
            trial_name = "0000"

            def setup(self, config: dict[str, Any]) -> None:  # type: ignore[override]
                super().setup(config, job=TuneConfig("", str(tmp_path), images=900))

            def advance(self) -> Rung:
                here = next(steps)
                if isinstance(here, Exception):
                    raise here
                return here

        return Scripted()

    return start


def record(tmp_path: Path) -> Record:
    return ledger.read(str(tmp_path), "0000")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_measurement_that_is_not_finite_fails_the_trial_for_good(
    attempt: Attempt, tmp_path: Path, value: float
) -> None:
    running = attempt(rung(100), rung(300, value))
    assert running.step() == {BITS_PER_DIM: 3.0, IMAGES: 100, SEEN: 100, FAILED: False, "done": False}
    ended = running.step()
    assert ended[FAILED] and ended["done"]
    found = record(tmp_path)
    assert (found.status, found.reason) == ("failed", f"bits_per_dim is {value} after 300 images")
    assert found.rungs == (rung(100),)
    assert found.over


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (BadSettings("--batch-size 7 is odd"), "failed", "--batch-size 7 is odd"),
        (InputError("MLflow at http://h: 403"), "interrupted", "MLflow at http://h: 403"),
        (Outage("no answer"), "interrupted", "no answer"),
        (OSError("disk\nis full"), "interrupted", "OSError: is full"),
        (WorkerGroupError(TRACEBACK, {}), "interrupted", "WorkerGroupError: OSError: s3://***@host is away"),
    ],
)
def test_what_the_settings_are_not_to_blame_for_is_tried_again(
    attempt: Attempt, tmp_path: Path, error: Exception, status: str, reason: str
) -> None:
    running = attempt(rung(100), error)
    running.step()
    assert running.step()[FAILED]
    found = record(tmp_path)
    assert (found.status, found.reason, found.lost, found.over) == (status, reason, True, status == "failed")
    if not found.over:
        again = attempt(rung(300), rung(900))
        assert not again.step()["done"]
        assert record(tmp_path).reason == ""
        assert again.step()["done"]
        found = record(tmp_path)
        assert (found.status, found.rungs) == ("finished", (rung(100), rung(300), rung(900)))


def test_a_rung_whose_answer_was_lost_is_asked_about_again_and_kept_once(
    attempt: Attempt, tmp_path: Path
) -> None:
    first = attempt(rung(100))
    told = first.step()
    again = attempt(rung(100), rung(300))
    assert again.step() == told
    assert record(tmp_path).rungs == (rung(100),)
    again.cleanup()  # Ray Tune's answer is to stop
    assert (record(tmp_path).status, record(tmp_path).rungs) == ("stopped", (rung(100),))
    again.cleanup()
    assert record(tmp_path).status == "stopped"


class Sighted(tune.Trainable):
    """Reports the MLflow address that it got, and the files of the search that hold the password."""

    def setup(self, config: dict[str, Any], *, folder: str, **settings: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trial, "connect", lambda: None)
            patch.setattr(ledger, "read", lambda *_: None)
            Trial.setup(self, config, job=TuneConfig("", ""), **settings)  # type: ignore[arg-type]
        self.folder = Path(folder)

    def step(self) -> dict[str, Any]:
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        seen = [str(path) for path in files if b"pl4nted" in path.read_bytes()]
        return {"address": os.environ["MLFLOW_TRACKING_URI"], "seen": seen, "files": len(files), "done": True}


def test_a_trial_reaches_the_drivers_mlflow_and_its_password_is_in_no_file(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "http://me:pl4nted@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    assert address.environment() == {}  # others can read the settings of a cluster's workers
    tuner = tune.Tuner(
        tune.with_parameters(Sighted, folder=str(tmp_path), tracking=address.with_secrets()),
        run_config=tune.RunConfig(name="s", storage_path=str(tmp_path), verbose=0),
    )
    (result,) = tuner.fit()
    assert result.metrics["address"] == place
    assert result.metrics["files"] > 0 and result.metrics["seen"] == []
