"""The driver's side of forkserver.py: a Ray that this process starts forks its workers."""

import atexit
import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.cluster import forkserver
from pipeline.cluster.forkserver import early_name, server_command

# Set to 0: every worker is a new Python, as in any other Ray.
SWITCH = "RAY_DDPM_FORK_WORKERS"
# Variables that a driver gets from `ray.init`, and a worker from its raylet, unless the user has set them. The job is the
# first one of a new Ray.
FROM_RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_CLIENT_MODE": "0",
    "RAY_JOB_ID": "01000000",
    "RAY_LD_PRELOAD_ON_WORKERS": "0",
    "SPT_NOENV": "1",
}
# Bytes of the temporary folder's path. That of a socket in a folder of it has 107 at most.
LONGEST_PLACE = 60


def start_server(preload: str, variables: dict[str, str]) -> Path | None:
    """Starts a server for the workers of a Ray that this process will start, and does not wait for it.

    Args:
        preload: modules that the workers need, separated by commas.
        variables: the workers' runtime environment.

    Returns:
        the folder to give to `forked_workers`; None where workers are not forked.
    """
    if not _can_fork():
        return None
    folder = _new_folder()
    environment = {**FROM_RAY, **os.environ, **variables}
    # Ray's own children hear neither: Ctrl-C and SIGTERM are the driver's business.
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / early_name(environment)))
            listener.listen(64)
            command = server_command(listener.fileno(), os.getpid(), preload, _worker_folder())
            server = subprocess.Popen(
                command, env=environment, pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
    atexit.register(server.kill)
    return folder


@contextlib.contextmanager
def forked_workers(preload: str, folder: Path | None = None) -> Iterator[None]:
    """Ray nodes that are started inside fork their workers.

    Args:
        preload: modules that the workers need, separated by commas.
        folder: of a server that `start_server` has started for them.
    """
    if not _can_fork():
        yield
        return
    python = sys.executable
    folder = folder or _new_folder()
    program = folder / "python"
    command = [python, "-I", "-S", forkserver.__file__, str(folder), preload]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    program.chmod(0o700)
    if os.access(program, os.X_OK):  # not where programs in temporary folders are forbidden
        sys.executable = str(program)  # Ray starts all its processes with it
    try:
        yield
    finally:
        sys.executable = python


def _can_fork() -> bool:
    return os.environ.get(SWITCH) != "0" and hasattr(os, "pidfd_open")


def _new_folder() -> Path:
    """A folder for the program and its sockets, removed at the end of this process.

    Only the user may enter: whoever reaches a socket may start processes.
    """
    place = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="ray-ddpm-", dir=place if len(place) < LONGEST_PLACE else "/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _worker_folder() -> str:
    """Where Ray's own worker is. Python puts this folder first into its search path."""
    found = importlib.util.find_spec("ray")
    return str(Path(found.origin).parent / "_private" / "workers") if found and found.origin else ""
