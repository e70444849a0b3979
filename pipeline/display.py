"""Output to the terminal: progress of long work, and silence for other libraries."""

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
# Loggers that are silenced. Each error that they report is also an exception, which the job reports in one line.
TALKATIVE = (
    "ray", "ray.data", "ray.train", "ray.tune", "mlflow", "alembic", "matplotlib", "fsspec", "gcsfs", "urllib3",
    "httpx", "httpx2",
)  # fmt: skip


def quieten() -> None:
    """Silences the logs of other libraries. Call it again after Ray's start, which sets its loggers' levels."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@contextlib.contextmanager
def redirected(descriptor: int, target: int) -> Iterator[int]:
    """Redirects a file descriptor, for C++ code as well. Yields a duplicate of the original descriptor.

    Args:
        descriptor: 1 (stdout) or 2 (stderr).
        target: descriptor that receives the output.
    """
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
    """Exits with code 0 and no error if stdout is closed inside this context, as in `--help | head`."""
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
    """A line on stderr that says what a job is doing while no progress can be counted.

    A line appears after `PHASE_SECONDS`, unless `clear` or another line comes first. So a job that fails at once prints
    only its error.
    """

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def show(self, line: str) -> None:
        """Shows a line after `PHASE_SECONDS`, in place of a line that still waits."""
        self.clear()
        self._stderr = os.dup(2)  # `redirected` may later change descriptor 2
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
"""The status line of this process, which does one job at a time."""


class Display:
    """Shows progress on stderr: a bar on a terminal, else plain lines.

    Args:
        title: title of the bar, or beginning of each line.
        total: number of units in all.
        unit: plural name of the units.
    """

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
        """Shows what the work does while no progress can be counted, such as "starting 2 workers"."""
        if self._bar is not None:
            self._bar.update(self._task, note=what)
        else:
            status.show(f"{self._title}: {what}")

    def update(self, done: int, note: str) -> None:
        """Shows the progress.

        Args:
            done: number of units done so far.
            note: figures to show beside the progress.
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
            line = f"{self._title}: {done}/{self._total} {self._unit}  {note}".rstrip()
            print(line, file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """Prints a separate line, above the bar."""
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
