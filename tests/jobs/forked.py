"""Jobs in processes of their own that start at once, because they are forked from a process with most imports done.

That process has imported nothing of Ray, because Ray's core reads the environment on import. A test of what a new Python
does (its imports, its exit, the signals of a whole process group) starts `common.command` instead.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import warnings
from pathlib import Path

from tests.jobs.common import ROOT, Outcome, environment, outcome_of

# What takes long of what the drivers of all jobs import.
PRELOAD = [
    "torch", "pandas", "pyarrow.parquet", "scipy.linalg", "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store",
]  # fmt: skip
_FORKING = multiprocessing.get_context("forkserver")


class ForkedJob:
    """A job's process, with methods like those of `subprocess.Popen`. It leads a process group of its own."""

    def __init__(
        self, job: str, *flags: object, cwd: Path, variables: dict[str, str], stdout: Path, stderr: Path
    ) -> None:
        """Start `jobs/JOB.py FLAGS`. What it prints is appended to two files, which may be the same."""
        self._stdout, self._stderr = stdout, stderr
        words = [str(ROOT / "jobs" / f"{job}.py"), *map(str, flags)]
        multiprocessing.set_forkserver_preload(PRELOAD)
        self._process = _FORKING.Process(
            target=_run, args=(words, str(cwd), variables, str(stdout), str(stderr))
        )
        self._process.start()
        self.pid = int(self._process.pid or 0)

    def outcome(self, timeout: float) -> Outcome:
        """Wait for the job's end, and return its outcome. If it runs longer than `timeout` seconds, it is killed."""
        try:
            code = self.wait(timeout)
        finally:
            self.kill()
        return outcome_of(code, self._stdout.read_text(), self._stderr.read_text())

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"the job runs longer than {timeout} s:\n{self._stderr.read_text()}"
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill its whole process group, and wait for its end."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()


def start_forked(job: str, *flags: object, home: Path, **extra: str) -> ForkedJob:
    """Start `jobs/JOB.py FLAGS` in `home`. It prints into JOB.stdout and JOB.stderr there."""
    files = {name: home / f"{job}.{name}" for name in ("stdout", "stderr")}
    return ForkedJob(job, *flags, cwd=home, variables=environment(home, **extra), **files)


def _run(words: list[str], cwd: str, variables: dict[str, str], stdout: str, stderr: str) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    if variables.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    for stream, file in ((1, stdout), (2, stderr)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
