"""SIGTERM reaches every process of a job, as SLURM and systemd send it."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.commands import cli
from pipeline.config import TrainConfig
from pipeline.lock import locked
from pipeline.training import checkpoint
from tests.jobs.common import command, environment
from tests.training.runs import undisturbed

pytestmark = pytest.mark.system

SECONDS = 180
SMALL = (
    "--batch-size", 30, "--model-channels", 32, "--channel-multipliers", 1, "--attention-resolutions", 4,
    "--timesteps", 20, "--log-every", 10,
)  # fmt: skip


def end_by_sigterm(
    home: Path, ready: Callable[[psutil.Process], object], job: str, *flags: object
) -> tuple[int, str]:
    """Start a job, send SIGTERM to all its processes, check that none is left, and return exit code and output."""
    with (home / f"{job}.log").open("w") as log:
        process = subprocess.Popen(
            command(job, *flags),
            cwd=home,
            env=environment(home),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    me = psutil.Process(process.pid)
    family = [me]
    try:
        end = time.monotonic() + SECONDS
        while not ready(me):
            assert process.poll() is None, (home / f"{job}.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        family = [me, *me.children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGTERM)
        code = process.wait(SECONDS)
        _, left = psutil.wait_procs(family, timeout=20)
        assert [one.name() for one in left] == []
        return code, (home / f"{job}.log").read_text()
    finally:
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def test_a_training_saves_and_can_be_resumed(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "digits").symlink_to(digits)

    def saved() -> list[str]:
        return checkpoint.complete(str(tmp_path / "run" / "checkpoints"))

    def trains(job: psutil.Process) -> bool:
        return "loss" in (tmp_path / "train.log").read_text()

    # No checkpoint is due, so the one that is there afterwards was saved because of the signal.
    flags = ("--data", "digits", "--output", "run", *SMALL, "--steps", 100_000, "--checkpoint-every", 100_000)
    code, said = end_by_sigterm(tmp_path, trains, "train", *flags)
    assert code == 128 + signal.SIGTERM, said
    assert len(saved()) == 1
    newest, _ = checkpoint.read(saved()[0])
    step = newest.step
    assert f"stopped at step {step} of 100000, which is saved; go on with --resume" in said
    assert "Traceback" not in said
    # Another job could lock the folder and go on. That a job does so is shown in test_training_faults.py.
    words = ("--data", digits, "--output", tmp_path / "run", *SMALL, "--steps", step + 1)
    config = cli.parse(TrainConfig, list(map(str, words)), "train", "")
    with locked(config.output):
        again = undisturbed(config, start=newest)
    assert again.end.step == step + 1


def test_a_job_that_is_starting_ends_with_the_signals_code(digits: Path, tmp_path: Path) -> None:
    """The signal comes while Ray's processes start."""

    def ready(job: psutil.Process) -> bool:
        return any(child.name() == "gcs_server" for child in job.children(recursive=True))

    (tmp_path / "digits").symlink_to(digits)
    code, said = end_by_sigterm(tmp_path, ready, "train", "--data", "digits", "--output", "run", *SMALL)
    last = said.strip().splitlines()[-1]
    assert (code, last) == (128 + signal.SIGTERM, "train: ended by SIGTERM"), said
    assert "Traceback" not in said
