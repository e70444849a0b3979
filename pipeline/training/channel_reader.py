"""The driver's reader of the channel. It passes the workers' messages to MLflow, to the output and to the terminal."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import ray

from pipeline import storage
from pipeline.cluster.session import spilled_bytes
from pipeline.display import Display
from pipeline.evaluation.config import BITS_PER_DIM
from pipeline.redact import one_line
from pipeline.tracking.tracker import Tracker

POLL_SECONDS = 0.5
LAST_ROUNDS = 10


class ChannelReader:
    """Reads the channel in a thread of the driver until the `with` block ends.

    Points go to MLflow and to `on_point`, files to the run's output, lines to the terminal. A restarted worker group
    repeats some steps and posts their points again; the reader passes on each point of a curve once.

    Args:
        channel: handle of the `RunChannel` actor.
        output: URI of the run.
        on_point: called with the step and the values of each new point.

    Attributes:
        latest: newest value of each figure, by name.
    """

    def __init__(
        self,
        channel: Any,
        output: str,
        display: Display,
        tracker: Tracker,
        on_point: Callable[[int, dict[str, float]], None],
    ) -> None:
        self._channel, self._output, self._display = channel, output, display
        self._tracker, self._on_point = tracker, on_point
        self._received = 0
        self._files = list[tuple[str, bytes]]()
        self._said = set[str]()
        self._progress, self._validation = (0, ""), ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="run-channel")
        self.latest: dict[str, float] = {}

    def _run(self) -> None:
        while not (self._done.wait(POLL_SECONDS) or self._tracker.lost.is_set()):
            self._round()

    def _round(self) -> bool:
        """Reads the channel once. Returns True if every file that it holds is written."""
        try:
            received, messages = ray.get(self._channel.take.remote(self._received), timeout=10)
        except (ray.exceptions.RayError, ConnectionError):
            return False  # the node is busy or shutting down; the next round tries again
        self._received = received
        for line in messages.notices:
            self._display.note(line)
        if messages.phase:
            self._display.phase(messages.phase)
        spilled = {"spilled_bytes": float(spilled_bytes())} if messages.points else {}
        points = [(when, step, values | spilled) for when, step, values in messages.points]
        for _, step, values in self._tracker.log_points(points):
            self.latest |= values
            if "loss" in values:
                self._progress = (
                    step,
                    f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s",
                )
            if BITS_PER_DIM in values:
                self._validation = f"  {values[BITS_PER_DIM]:.3f} bits/dim at step {step}"
            self._display.update(self._progress[0], self._progress[1] + self._validation)
            try:
                self._on_point(step, values)
            except Exception as error:  # an error of the caller's code does not stop the run
                self._say_once(f"on_point failed: {type(error).__name__}: {one_line(error)}")
        self._files += messages.files
        while self._files:
            path, content = self._files[0]
            try:
                storage.write_atomic(storage.join(self._output, path), content)
            except Exception as error:  # the storage fails; the next round tries again
                self._say_once(f"{path} can't be written to {self._output} now: {one_line(error)}")
                break
            self._files.pop(0)
            self._tracker.log_file(path)
        return not self._files

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._display.note(line)

    def __enter__(self) -> "ChannelReader":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        for _ in range(LAST_ROUNDS):
            if self._tracker.lost.is_set() or self._round():
                break
            time.sleep(POLL_SECONDS)
