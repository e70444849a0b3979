"""Run every test except the soak tests, in four processes side by side that take about equally long.

Two processes run the system tests, which mostly wait, and two the others, which mostly compute. `python -m tests` shows
the first process's output as it comes, and that of the others once all have ended. After MOST_SECONDS, or on SIGTERM,
each process prints the stacks of its threads and is ended.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent
PYTEST = [sys.executable, "-m", "pytest"]
# The submitted jobs share a cluster. The other files make the two processes of system tests take equally long.
WITH_SUBMITTED_JOBS = ("test_submitted_jobs", "test_tour", "test_search", "test_examples", "test_main_job")
MOST_SECONDS = 70 * 60
SECONDS_TO_CLEAR_UP = 60


def commands() -> list[list[str]]:
    """Return the arguments of each process."""
    # Importing the files without system tests would take half a minute.
    system = [file for file in ROOT.rglob("test_*.py") if "mark.system" in file.read_text()]
    served = [file for file in system if file.stem in WITH_SUBMITTED_JOBS]
    others = [file for file in system if file not in served]
    training = [ROOT / name for name in ("training", "tracking", "tuning")]
    chosen = [("system", served), ("system", others), ("not system", training), ("not system", [ROOT])]
    left_out = [f"--ignore={folder}" for folder in training]
    return [
        [*PYTEST, "-m", f"{mark} and not soak", "-p", "no:cacheprovider", *map(str, sorted(files))]
        + (left_out if files == [ROOT] else [])
        for mark, files in chosen
    ]


def run() -> int:
    """Run all processes and return the largest of their exit codes."""
    signal.signal(signal.SIGTERM, _terminated)
    first, *others = commands()
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in others]
        started = [subprocess.Popen(first)]
        started += [
            subprocess.Popen(command, stdout=log, stderr=log)
            for command, log in zip(others, logs, strict=True)
        ]
        deadline = time.monotonic() + MOST_SECONDS
        try:
            for process in started:
                process.wait(deadline - time.monotonic())
        except (subprocess.TimeoutExpired, TimeoutError, KeyboardInterrupt) as why:
            _end(started, ask=not isinstance(why, KeyboardInterrupt))  # Ctrl-C reaches them too
            print(f"tests: ended before they were done (at most {MOST_SECONDS} s)", file=sys.stderr)
            return 1
        finally:
            for log in logs:
                _show(log)
        return max(abs(process.returncode) for process in started)


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


def _show(log: IO[bytes]) -> None:
    log.seek(0)
    sys.stdout.buffer.write(log.read())
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run())
