"""The terminal output of a run's channel."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline import display
from pipeline.display import Display
from pipeline.training.channel_reader import ChannelReader
from pipeline.training.run_channel import open_channel


def test_phases_are_shown_until_there_are_figures_and_the_validations_stand_beside_the_loss(
    cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "PHASE_SECONDS", 0.1)
    monkeypatch.setattr(display, "PLAIN_LINE_SECONDS", 0.0)
    tracker: Any = SimpleNamespace(lost=threading.Event(), log_points=lambda points: points)
    channel = open_channel({})
    phase_shown = threading.Event()
    note = Display.phase

    def phase(self: Display, what: str) -> None:
        note(self, what)
        phase_shown.set()

    monkeypatch.setattr(Display, "phase", phase)
    with (
        Display("train", 20, "steps") as shown,
        ChannelReader(channel, str(tmp_path), shown, tracker, lambda step, values: None),
    ):
        ray.get(channel.phase.remote("building the model"))
        assert phase_shown.wait(20)
        threading.Event().wait(0.5)
        for step, loss in ((10, 0.5), (20, 0.25)):
            ray.get(channel.post_points.remote([(0, step, {"loss": loss, "images_per_second": 100.0})]))
        ray.get(channel.post_points.remote([(0, 10, {"bits_per_dim": 3.25})]))
    ray.kill(channel)
    assert capfd.readouterr().err.splitlines() == [
        "train: building the model",
        "train: 10/20 steps  loss 0.5000  100 images/s",
        "train: 20/20 steps  loss 0.2500  100 images/s",
        "train: 20/20 steps  loss 0.2500  100 images/s  3.250 bits/dim at step 10",
    ]
