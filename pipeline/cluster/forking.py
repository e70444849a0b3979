"""The driver's side of forkserver.py. It makes a Ray that this process starts fork its workers."""

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

# If this variable is 0, every worker is a new Python, as in any other Ray.
SWITCH = "RAY_DDPM_FORK_WORKERS"
# Variables that `ray.init` sets in a driver, and the raylet in a worker, unless the user has set them. The job id is that
# of a new Ray's first job.
FROM_RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_CLIENT_MODE": "0",
    "RAY_JOB_ID": "01000000",
    "RAY_LD_PRELOAD_ON_WORKERS": "0",
    "SPT_NOENV": "1",
}
# Longest path of a temporary folder, in characters. Linux limits the path of a socket below it to 107 bytes.
LONGEST_PLACE = 60


def start_server(preload: str, variables: dict[str, str]) -> Path | None:
    """Starts a fork server for a Ray that this process will start, and does not wait for it.

    Args:
        preload: modules that the workers need, separated by commas.
        variables: the workers' runtime environment.

    Returns:
        the folder to give to `forked_workers`; None if workers are not forked.
    """
    if not _can_fork():
        return None
    folder = _new_folder()
    environment = {**FROM_RAY, **os.environ, **variables}
    # Only the driver handles Ctrl-C and SIGTERM, so the server blocks them, as Ray's own children do.
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
    """Ray nodes that start inside this context fork their workers.

    Args:
        preload: modules that the workers need, separated by commas.
        folder: result of `start_server`; None = the first worker becomes the server.
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
    if os.access(program, os.X_OK):  # false if the temporary folder is mounted noexec
        sys.executable = str(program)  # Ray starts all its processes with it
    try:
        yield
    finally:
        sys.executable = python


def _can_fork() -> bool:
    return os.environ.get(SWITCH) != "0" and hasattr(os, "pidfd_open")


def _new_folder() -> Path:
    """Makes a folder for the program and its sockets, which is removed at the end of this process.

    Only the user can enter it, because anyone who reaches a socket can start processes.
    """
    place = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="ray-ddpm-", dir=place if len(place) < LONGEST_PLACE else "/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _worker_folder() -> str:
    """The folder of Ray's own worker script. Python puts it first into the worker's search path."""
    found = importlib.util.find_spec("ray")
    return str(Path(found.origin).parent / "_private" / "workers") if found and found.origin else ""
