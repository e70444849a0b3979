"""Run every test except the soak tests, in four processes, of which two run at a time.

The suite is bound by the processors, so more at a time only make each test slower. `python -m tests` shows each
process's output at its end. After MOST_SECONDS, or on SIGTERM, each process prints the stacks of its threads and is
ended.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from tests.system.served import kill

# Without pytest's cache, which processes side by side would overwrite.
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m"]
AT_A_TIME = 2
MOST_SECONDS = 70 * 60
SECONDS_TO_CLEAR_UP = 60


def groups() -> list[tuple[str, list[str]]]:
    """Return markers and files of each process. The longest come first, so that both processors work to the end.

    No two processes import the same test modules, whose imports take up to half a minute, nor start the same cluster.
    """
    here = Path(__file__).parent
    system, training = [str(here / "system")], [str(here / name) for name in ("cluster", "training")]
    rest = [str(file) for file in sorted(here.iterdir()) if file.is_dir() or file.name.startswith("test_")]
    rest = [file for file in rest if file not in (*system, *training) and not file.endswith("__")]
    return [
        ("(machines or served) and not soak", system),
        ("not soak", rest),
        ("not soak", training),
        ("not (machines or served or soak)", system),
    ]


def run() -> int:
    """Run all processes and return the largest of their exit codes."""
    signal.signal(signal.SIGTERM, _terminated)
    # Each of some hundred processes would compile the modules again if this were set.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    waiting, running = groups(), dict[subprocess.Popen[bytes], IO[bytes]]()
    deadline, code = time.monotonic() + MOST_SECONDS, 0
    try:
        while waiting or running:
            while waiting and len(running) < AT_A_TIME:
                markers, files = waiting.pop(0)
                print(f"tests: running {markers!r} of {len(files)} files and folders", flush=True)
                log = tempfile.TemporaryFile()  # noqa: SIM115  (_show closes it)
                command = [*PYTEST, markers, *files]
                running[subprocess.Popen(command, stdout=log, stderr=log, env=environment)] = log
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
