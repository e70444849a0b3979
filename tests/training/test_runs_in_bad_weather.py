"""Whole runs through storage faults, and through stops during validation, end as the run that nothing disturbs."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray

from pipeline import storage
from pipeline.cluster.ray_internals import placement_groups
from pipeline.errors import InputError, Interrupted
from pipeline.training import checkpoint
from pipeline.training.checkpoint_manager import SNAPSHOT
from pipeline.training.state import TrainState
from pipeline.training.trainer import Trained, train
from pipeline.training.worker import Hooks
from tests.data.weather import Weather
from tests.training.digit_runs import assert_same, curve, newest, settings
from tests.training.runs import Undisturbed


class Slow:
    """A hook that makes each step take `seconds` longer, so that something can happen between two steps."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, state: TrainState, rank: int, world_size: int) -> bool:
        time.sleep(self._seconds)
        return False


def at(step: int, do: Callable[[], None]) -> Callable[[int, dict[str, float]], None]:
    """Return an `on_point` hook that calls `do` once, when the curve reaches a step."""
    waiting = [do]

    def on_point(now: int, values: dict[str, float]) -> None:
        if now >= step and waiting:
            waiting.pop()()

    return on_point


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def kill_controller() -> None:
    """Send SIGKILL to Ray Train's controller, which keeps the list of checkpoints."""
    for process in psutil.Process().children(recursive=True):  # other tests have controllers too
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::TrainController" in " ".join(process.cmdline()):
                process.kill()


def test_stops_with_validated_unvalidated_and_pending_checkpoints_leave_no_trace(
    home: Path, straight: Undisturbed
) -> None:
    output = str(home / "stopped")
    config = settings(
        home, output, log_every=1, checkpoint_every=2, validate_every=2, validation_images=16, validation_terms=4,
        keep_checkpoints=3, resume=True,
    )  # fmt: skip
    slow = Hooks(watch=Slow(0.4))
    for step, stop, error in (
        (5, interrupt, Interrupted),
        (8, kill_controller, ray.exceptions.RayError),
        (11, interrupt, Interrupted),
        (14, interrupt, Interrupted),
    ):
        with pytest.raises(error):
            train(config, on_point=at(step, stop), hooks=slow)
        if stop is kill_controller:  # in a search, the other trials need the resources that it had reserved
            assert not placement_groups()
        assert storage.exists(f"{output}/checkpoints/{SNAPSHOT}")
        # An interrupted run saves its current step. A killed run has only the checkpoints of every second step.
        assert newest(output)[0].step >= step - (2 if stop is kill_controller else 1)
    trained = train(config)
    assert_same(newest(output)[0], straight.end)
    bits, losses = curve(trained, "bits_per_dim"), curve(trained, "loss")
    assert sorted(losses) == list(range(1, 19))
    assert {4, 12, 16, 18} <= set(bits)
    kept = [checkpoint._read_state(uri)["step"] for uri in checkpoint.complete(f"{output}/checkpoints")]
    assert kept[0] == 18
    assert set(sorted(bits, key=lambda step: bits[step])[:2]) <= set(kept)


@pytest.fixture(scope="module")
def deleted(home: Path) -> tuple[Trained, checkpoint.Saved]:
    """A run from which a user deletes a checkpoint, and the content of its newest."""
    output = str(home / "deleted")

    def delete() -> None:
        storage.remove_folder(checkpoint.complete(f"{output}/checkpoints")[-1])

    config = settings(home, output, log_every=1)
    trained = train(config, on_point=at(7, delete), hooks=Hooks(watch=Slow(0.3)))
    return trained, newest(output)[0]


def test_a_checkpoint_that_a_user_deletes_does_not_end_the_run(
    deleted: tuple[Trained, checkpoint.Saved], straight: Undisturbed
) -> None:
    """Ray Train would delete it later, when two newer ones are written."""
    trained, end = deleted
    assert_same(end, straight.end)
    assert sorted(curve(trained, "loss")) == list(range(1, 19))


@pytest.mark.parametrize(
    ("where", "said"),
    [
        pytest.param("step-", "the checkpoint of step 2 can't be written", marks=pytest.mark.soak),
        ("", "the storage of the checkpoints"),
    ],
)
def test_a_storage_that_is_away_for_a_while_loses_nothing(
    home: Path,
    straight: Undisturbed,
    bucket: str,
    weather: Weather,
    where: str,
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Writes of checkpoints and of Ray Train's own files fail with a fault that no client retries by itself."""
    config = settings(home, f"{bucket}/stormy", checkpoint_every=2, storage_patience=60)
    weather.storm("expired", 4.0, lambda method, path: method == "PUT" and f"/checkpoints/{where}" in path)
    train(replace(config, steps=10), hooks=Hooks(watch=Slow(0.3)))
    assert weather.seen
    assert said in capfd.readouterr().err

    weather.storm("expired", 3.0, lambda method, path: method == "GET" and "state.json" in path)
    trained = train(replace(config, resume=True))
    assert "can't be read" in capfd.readouterr().err
    assert_same(newest(config.output)[0], straight.end)
    losses = curve(trained, "loss")
    shared = {step: loss for step, loss in straight.losses.items() if step != 12}
    assert losses.items() >= shared.items()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(
    home: Path, deleted: tuple[Trained, checkpoint.Saved]
) -> None:
    output = home / "deleted"
    for file in (output / "checkpoints").glob("step-*/weights.safetensors"):
        file.write_bytes(b"")
    before = sorted((output / "checkpoints").rglob("*"))
    with pytest.raises(InputError, match=r"all \d checkpoints in \S+ are damaged \(step-"):
        train(settings(home, str(output), log_every=1, resume=True))
    assert sorted((output / "checkpoints").rglob("*")) == before
