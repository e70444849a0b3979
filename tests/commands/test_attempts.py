"""A job that restarts automatically ends at once if an attempt with the same flags was refused."""

import time
from pathlib import Path

import pytest

from pipeline.commands import attempts, cli
from pipeline.config import TrainConfig
from pipeline.errors import InputError, Outage

FLAGS = ["--data", "d", "--output", "o"]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "refusals"
    monkeypatch.setenv(attempts.FOLDER, str(folder))
    return folder


class Job:
    """A job that raises `error` as long as it has one, and counts how often it began."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.begun = error, 0

    def execute(self, config: TrainConfig) -> dict[str, str]:
        self.begun += 1
        if self.error:
            raise self.error
        return {"output": "o"}

    def run(self, *more: str) -> int:
        return cli.main("train", "", TrainConfig, self.execute, [*FLAGS, *more], ray="never")


def test_every_further_attempt_ends_at_once_and_then_the_job_begins_anew(
    notes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = Job(InputError("--data d: no such folder"))
    assert job.run() == 2
    capfd.readouterr()
    for _ in range(attempts.FURTHER):
        assert job.run() == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(
            "train: not begun: 0 s ago an attempt with the same flags ended with: --data d: no"
        )
    assert job.begun == 1
    job.error = None  # a person fixed the input and starts the job again
    assert job.run() == 0
    assert job.begun == 2 and list(notes.iterdir()) == []


def test_other_flags_are_another_job(notes: Path) -> None:
    job = Job(InputError("bad"))
    assert job.run("--steps", "3") == 2
    job.error = None
    assert job.run("--steps", "4") == 0


def test_a_mistake_in_the_flags_counts_too(notes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert Job(None).run("--stepz", "3") == 2
    assert Job(None).run("--stepz", "3") == 2
    assert "not begun" in capfd.readouterr().err


@pytest.mark.parametrize("error", [Outage("the storage is away"), RuntimeError("the node is gone")])
def test_what_may_pass_is_tried_again(notes: Path, error: Exception) -> None:
    job = Job(error)
    job.run()
    job.error = None
    assert job.run() == 0 and job.begun == 2


def test_a_note_is_not_for_ever(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(InputError("bad"))
    assert job.run() == 2
    job.error = None
    later = time.time() + attempts.SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert job.run() == 0


@pytest.mark.parametrize("folder", ["", "/proc/nowhere"])
def test_without_a_place_for_notes_all_is_as_before(
    folder: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(attempts.FOLDER, folder)
    job = Job(InputError("bad"))
    assert [job.run(), job.run()] == [2, 2]
    assert job.begun == 2
    assert "Traceback" not in capfd.readouterr().err
