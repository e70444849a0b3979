"""Jobs, and nodes' workers, that start at once because they are forked from a template (template.py).

A test of what a new Python does (its imports, its exit, the signals of a whole process group) starts `common.command`
instead.
"""

import atexit
import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.cluster import forking, forkserver
from tests.jobs import template
from tests.jobs.common import ROOT, Outcome, environment, outcome_of
from tests.jobs.template import ask, read_number

_TEMPLATE = list[psutil.Process]()


@functools.cache
def template_address() -> str:
    """Start the template of this test process, which ends with it, and return the path of its socket."""
    folder = tempfile.mkdtemp(prefix="rt-", dir="/tmp")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = f"{folder}/template"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        words = [sys.executable, template.__file__, "--template", str(listener.fileno())]
        own = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], cwd="/")
    _TEMPLATE.append(psutil.Process(own.pid))
    atexit.register(own.kill)
    return address


@contextlib.contextmanager
def forked_workers(preload: str, address: str, folder: Path | None = None) -> Iterator[None]:
    """As `forking.forked_workers`, but the fork servers are forked from the template at `address`."""
    with forking.forked_workers(preload, folder):
        program = Path(sys.executable)
        ours = f"{template.__file__} {address}"
        program.write_text(program.read_text().replace(forkserver.__file__, ours))
        yield


def starting_node(address: str, *words: object) -> list[str]:
    """Return the command `ray WORDS`, which starts a node whose fork servers are forked from the template."""
    program = (
        f"import sys; sys.path.append({str(ROOT)!r})\n"
        "from ray.scripts.scripts import main\n"
        "from tests.jobs.forked import forked_workers\n"
        f"with forked_workers('pipeline.training.worker', {address!r}): main()"
    )
    return [sys.executable, "-c", program, *map(str, words)]


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Return a process's descendants, with the fork servers of its raylets and their workers.

    The system calls a fork server a child of the template.
    """
    below = process.children(recursive=True)
    names = {f"of-{one.pid}" for one in (process, *below)}
    for server in [child for one in _TEMPLATE for child in one.children()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if server.name() in names:
                below += [server, *server.children(recursive=True)]
    return below


class ForkedJob:
    """A job's process, with methods like those of `subprocess.Popen`. It leads a process group of its own."""

    def __init__(
        self, job: str, *flags: object, cwd: Path, variables: dict[str, str], stdout: Path, stderr: Path
    ) -> None:
        """Start `jobs/JOB.py FLAGS`. What it prints is appended to two files, which may be the same."""
        self._stdout, self._stderr = stdout, stderr
        self._code: int | None = None
        words = [str(ROOT / "jobs" / f"{job}.py"), *map(str, flags)]
        files = [os.open(os.devnull, os.O_RDONLY)]
        files += [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for file in (stdout, stderr)]
        try:
            self.pid, self._ended = ask(
                template_address(), files, words=words, environment=variables, folder=str(cwd), niceness=0, name=job
            )  # fmt: skip
        finally:
            for file in files:
                os.close(file)

    def outcome(self, timeout: float) -> Outcome:
        """Wait for the job's end, and return its outcome. If it runs longer than `timeout` seconds, it is killed."""
        try:
            code = self.wait(timeout)
        finally:
            self.kill()
        return outcome_of(code, self._stdout.read_text(), self._stderr.read_text())

    def poll(self) -> int | None:
        if self._code is None:
            self._receive(timeout=0)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            self._receive(timeout)
        assert self._code is not None, f"the job runs longer than {timeout} s:\n{self._stderr.read_text()}"
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill its whole process group, and wait for its end."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()

    def _receive(self, timeout: float | None) -> None:
        """Wait up to `timeout` seconds for the exit code."""
        self._ended.settimeout(timeout)
        try:
            self._code = read_number(self._ended)
        except (TimeoutError, BlockingIOError):
            return
        self._ended.close()


def start_forked(job: str, *flags: object, home: Path, **extra: str) -> ForkedJob:
    """Start `jobs/JOB.py FLAGS` in `home`. It prints into JOB.stdout and JOB.stderr there."""
    files = {name: home / f"{job}.{name}" for name in ("stdout", "stderr")}
    return ForkedJob(job, *flags, cwd=home, variables=environment(home, **extra), **files)
