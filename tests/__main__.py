"""Run every test except the soak tests, in two processes side by side that take about equally long.

`python -m tests` shows the first process's output as it comes, and the second's once both have ended. After
MOST_SECONDS, or on SIGTERM, each process prints the stacks of its threads and is ended.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

PYTEST = [sys.executable, "-m", "pytest"]
MOST_SECONDS = 70 * 60
SECONDS_TO_CLEAR_UP = 60


def with_system_tests() -> list[str]:
    """Return the files that mark a test as `system`. Importing all the others would take half a minute."""
    files = sorted(Path(__file__).parent.rglob("test_*.py"))
    return [str(file) for file in files if "mark.system" in file.read_text()]


def run() -> int:
    """Run both processes and return the larger of their exit codes."""
    signal.signal(signal.SIGTERM, _terminated)
    with tempfile.TemporaryFile() as log:
        first = subprocess.Popen([*PYTEST, "-m", "system and not soak", *with_system_tests()])
        rest = ["-m", "not system and not soak", "-p", "no:cacheprovider"]
        second = subprocess.Popen([*PYTEST, *rest], stdout=log, stderr=log)
        started, deadline = (first, second), time.monotonic() + MOST_SECONDS
        try:
            for process in started:
                process.wait(deadline - time.monotonic())
        except (subprocess.TimeoutExpired, TimeoutError, KeyboardInterrupt) as why:
            _end(started, ask=not isinstance(why, KeyboardInterrupt))  # Ctrl-C reaches them too
            _show(log)
            print(f"tests: ended before they were done (at most {MOST_SECONDS} s)", file=sys.stderr)
            return 1
        _show(log)
        return max(abs(process.returncode) for process in started)


def _terminated(number: int, frame: object) -> None:
    raise TimeoutError


def _end(started: tuple[subprocess.Popen[bytes], ...], ask: bool) -> None:
    """End both. If `ask`, each first prints its threads' stacks (tests/conftest.py) and ends what it started."""
    for process in started:
        if ask and process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            time.sleep(1)
            process.send_signal(signal.SIGINT)
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(SECONDS_TO_CLEAR_UP)
        process.kill()


def _show(log: IO[bytes]) -> None:
    log.seek(0)
    sys.stdout.buffer.write(log.read())
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run())
