"""Run every test except the soak tests, in four processes, of which two run at a time.

The suite is bound by the processors, so more at a time only make each test slower. `python -m tests` shows each
process's output at its end. After MOST_SECONDS, or on SIGTERM, each process prints the stacks of its threads and is
ended.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO

from tests.system.served import kill

# Without pytest's cache, which processes side by side would overwrite.
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
SYSTEM, TRAINING = ["tests/system"], ["tests/cluster", "tests/training"]
# Each process's part of the command line. No two processes import the same test modules, whose imports take up to half
# a minute, or start the same cluster. The longest come first, so that both processors work to the end.
GROUPS = [
    ["-m", "(machines or served) and not soak", *SYSTEM],
    ["-m", "not soak", *(f"--ignore={folder}" for folder in (*SYSTEM, *TRAINING))],
    ["-m", "not soak", *TRAINING],
    ["-m", "not (machines or served or soak)", *SYSTEM],
]
AT_A_TIME = 2
MOST_SECONDS = 70 * 60
SECONDS_TO_CLEAR_UP = 60


def run() -> int:
    """Run all processes and return the largest of their exit codes."""
    signal.signal(signal.SIGTERM, _terminated)
    # Each of some hundred processes would compile the modules again if this were set.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    waiting, running = list(GROUPS), dict[subprocess.Popen[bytes], IO[bytes]]()
    deadline, code = time.monotonic() + MOST_SECONDS, 0
    try:
        while waiting or running:
            while waiting and len(running) < AT_A_TIME:
                words = waiting.pop(0)
                print(f"tests: running pytest {shlex.join(words)}", flush=True)
                log = tempfile.TemporaryFile()  # noqa: SIM115  (_show closes it)
                running[subprocess.Popen([*PYTEST, *words], stdout=log, stderr=log, env=environment)] = log
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(1)
            for process in [process for process in running if process.poll() is not None]:
                code = max(code, abs(process.returncode))
                _show(running.pop(process))
    except (TimeoutError, KeyboardInterrupt) as why:
        _end(list(running), ask=not isinstance(why, KeyboardInterrupt))  # Ctrl-C reaches them too
        for log in running.values():
            _show(log)
        print(f"tests: ended before they were done (at most {MOST_SECONDS} s)", file=sys.stderr)
        return 1
    return code


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
        try:
            process.wait(SECONDS_TO_CLEAR_UP)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            kill(process)


def _show(log: IO[bytes]) -> None:
    with log:
        log.seek(0)
        sys.stdout.buffer.write(log.read())
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run())
