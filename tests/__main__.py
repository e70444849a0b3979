"""Run every test except the soak tests, in three processes side by side.

One runs the tests that start clusters and jobs, one those on the local Ray, and one those without Ray.

`python -m tests` shows the first process's output as it comes, and the others' once all have ended. After MOST_SECONDS,
or on SIGTERM, each process prints the stacks of its threads and is ended.
"""

import contextlib
import os
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
    """Run all processes and return the largest of their exit codes."""
    signal.signal(signal.SIGTERM, _terminated)
    # Each of some hundred processes would compile the modules again if this were set.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = list[tuple[subprocess.Popen[bytes], IO[bytes] | None]]()
    with contextlib.ExitStack() as stack:
        for tests in (
            ["-m", "system and not soak", *with_system_tests()],
            ["-m", "cluster and not system and not soak", "-p", "no:cacheprovider"],
            ["-m", "not cluster and not system and not soak", "-p", "no:cacheprovider"],
        ):
            log = stack.enter_context(tempfile.TemporaryFile()) if started else None
            process = subprocess.Popen([*PYTEST, *tests], stdout=log, stderr=log, env=environment)
            started.append((process, log))
        processes, deadline = [process for process, _ in started], time.monotonic() + MOST_SECONDS
        ended = False
        try:
            for process in processes:
                process.wait(deadline - time.monotonic())
        except (subprocess.TimeoutExpired, TimeoutError, KeyboardInterrupt) as why:
            _end(processes, ask=not isinstance(why, KeyboardInterrupt))  # Ctrl-C reaches them too
            ended = True
        for _, log in started:
            _show(log)
        if ended:
            print(f"tests: ended before they were done (at most {MOST_SECONDS} s)", file=sys.stderr)
            return 1
        return max(abs(process.returncode) for process in processes)


def _terminated(number: int, frame: object) -> None:
    raise TimeoutError


def _end(started: list[subprocess.Popen[bytes]], ask: bool) -> None:
    """End all. If `ask`, each first prints its threads' stacks (tests/conftest.py) and ends what it started."""
    for process in started:
        if ask and process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            time.sleep(1)
            process.send_signal(signal.SIGINT)
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(SECONDS_TO_CLEAR_UP)
        process.kill()


def _show(log: IO[bytes] | None) -> None:
    if log:
        log.seek(0)
        sys.stdout.buffer.write(log.read())
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run())
