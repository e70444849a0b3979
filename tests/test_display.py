"""Status and progress lines on the terminal while a job works."""

import time
from collections.abc import Iterator

import pytest

from pipeline import display
from pipeline.display import Display, redirected, status


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(display, "PHASE_SECONDS", 0.05)
    yield
    status.clear()


def test_a_status_appears_once_it_lasts_even_while_stderr_is_held_back(
    capfd: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    with open(f"{tmp_path}/held", "w") as held:  # noqa: PTH123
        status.show("train: starting Ray")
        with redirected(2, held.fileno()):
            time.sleep(0.3)
    assert capfd.readouterr().err == "train: starting Ray\n"


def test_a_status_that_ends_at_once_is_not_shown(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "PHASE_SECONDS", 0.2)
    status.show("train: opening the data")
    status.show("train: starting Ray")
    status.clear()
    time.sleep(0.4)
    assert capfd.readouterr().err == ""


def test_progress_ends_a_phase(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "PHASE_SECONDS", 0.2)
    with Display("train", 10, "steps") as shown:
        shown.phase("starting 2 workers")
        time.sleep(0.5)
        shown.phase("reading the first batch")
        shown.update(10, "loss 0.5")
        time.sleep(0.4)
    assert capfd.readouterr().err.splitlines() == [
        "train: starting 2 workers",
        "train: 10/10 steps  loss 0.5",
    ]
