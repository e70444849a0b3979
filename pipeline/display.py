"""What reaches the terminal: progress of long work, and what of other libraries' words is kept off it."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS, PHASE_SECONDS = 10.0, 1.0
# Whatever they report as an error also comes as an exception, which is told in one line.
TALKATIVE = (
    "ray", "ray.data", "ray.train", "ray.tune", "mlflow", "alembic", "matplotlib", "fsspec", "gcsfs", "urllib3",
    "httpx", "httpx2",
)  # fmt: skip


def quieten() -> None:
    """No words of other libraries on stderr. Ray sets its loggers' levels when it starts: call it after that, too."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@contextlib.contextmanager
def redirected(descriptor: int, target: int) -> Iterator[int]:
    """Sends what is written to a file descriptor to another, also by C++; yields a duplicate of the real one."""
    stream = {1: sys.stdout, 2: sys.stderr}[descriptor]
    stream.flush()
    real = os.dup(descriptor)
    os.dup2(target, descriptor)
    try:
        yield real
    finally:
        stream.flush()
        os.dup2(real, descriptor)
        os.close(real)


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """What is printed inside may have a reader that ends early, as in `--help | head`: no error, with exit code 0."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


class Status:
    """What a job is doing while there is no progress to count: a line on stderr.

    A line appears after `PHASE_SECONDS`, unless `clear` or another line comes first. So a job that fails at once prints
    its error alone.
    """

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def show(self, line: str) -> None:
        """Shows a line soon, in place of the one that waits."""
        self.clear()
        self._stderr = os.dup(2)  # `redirected` may hold back the real one
        self._timer = threading.Timer(PHASE_SECONDS, os.write, (self._stderr, f"{line}\n".encode()))
        self._timer.daemon = True
        self._timer.start()

    def clear(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            self._timer = None
            os.close(self._stderr)


status = Status()
"""Of this process, which does one job at a time."""


class Display:
    """A progress bar on a terminal, plain lines elsewhere; on stderr."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._total, self._unit, self._title, self._last = total, unit, title, 0.0
        self._began: tuple[float, int] | None = None
        self._bar: Progress | None = None
        status.clear()
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, note="")
            self._bar.start()

    def phase(self, what: str) -> None:
        """Says what the work is at while no progress can be counted, as a present participle: "starting 2 workers"."""
        if self._bar is not None:
            self._bar.update(self._task, note=what)
        else:
            status.show(f"{self._title}: {what}")

    def update(self, done: int, note: str) -> None:
        """Shows the progress.

        Args:
            done: units done so far.
            note: figures to show beside it.
        """
        status.clear()
        now = time.monotonic()
        began, first = self._began = self._began or (now, done)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif done >= self._total or now - self._last > PLAIN_LINE_SECONDS:
            self._last = now
            if first < done < self._total:
                left = (now - began) * (self._total - done) / (done - first)
                note = f"{note}  {timedelta(seconds=round(left))} left"
            print(f"{self._title}: {done}/{self._total} {self._unit}  {note}", file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(f"{self._title}: {line}", file=sys.stderr, flush=True)

    def close(self) -> None:
        status.clear()
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
