"""Ray's worker processes forked from one that has imported the libraries already.

A worker of Ray is a new Python that imports Ray, Ray Data, Ray Train and torch: three to eight seconds of a core, and a
training in Ray Train is ten of them. A Ray that a job starts for itself is given a program in place of Python
(`forked_workers`). Ray's raylet calls it to start a worker, with the command line of that worker:

    first call      it becomes the server: it imports the modules, then forks the worker, and stays
    later calls     it asks the server to fork, and ends
    no worker       it becomes Python: for the dashboard's agent, the monitors and whatever else Ray starts

A server serves the calls of one raylet that come with the same environment, so that a forked worker is what a started one
would be: libraries read the environment when they are imported. The worker's runtime environment counts as well; one that
asks for more than variables (a package, a container) gets a Python of its own. The server ends with its raylet, and its
workers with it. Linux has what this needs; elsewhere every worker is a new Python.

This file is also that program, so it imports the standard library alone, and that late.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

SETUP = "setup_worker.py"
CONTEXT = "--serialized-runtime-env-context="
# Set to 0: every worker is a new Python, as in any other Ray.
SWITCH = "RAY_DDPM_FORK_WORKERS"
# Bytes of the temporary folder's path. That of a socket in a folder of it has 107 at most.
LONGEST_PLACE = 60


@contextlib.contextmanager
def forked_workers(preload: str) -> Iterator[None]:
    """Ray nodes that are started inside fork their workers.

    Args:
        preload: modules that the workers need, separated by commas.
    """
    import atexit
    import shlex
    import shutil
    import tempfile

    if os.environ.get(SWITCH) == "0" or not hasattr(os, "pidfd_open"):
        yield
        return
    python = sys.executable
    # Only the user may enter: whoever reaches the socket may start processes.
    place = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="ray-ddpm-", dir=place if len(place) < LONGEST_PLACE else "/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = folder / "python"
    command = [python, "-I", "-S", __file__, str(folder), preload]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    program.chmod(0o700)
    if os.access(program, os.X_OK):  # not where programs in temporary folders are forbidden
        sys.executable = str(program)  # Ray starts all its processes with it
    try:
        yield
    finally:
        sys.executable = python


def main() -> None:
    """Starts what Ray asks for: a worker by the server, anything else as it is."""
    folder, preload, *command = sys.argv[1:]
    context = _context(command)
    if context is not None:
        with contextlib.suppress(OSError):
            if _become_or_ask_server(Path(folder), preload, command, context):
                return
    os.execv(sys.executable, [sys.executable, *command])


def _context(command: list[str]) -> dict[str, str] | None:
    """The variables of the worker's runtime environment; None for what must have a Python of its own."""
    if Path(command[0]).name != SETUP or "--language=PYTHON" not in command:
        return None
    found = [part.removeprefix(CONTEXT) for part in command if part.startswith(CONTEXT)]
    context = json.loads(found[0]) if found else {}
    own = context.get("command_prefix") or context.get("override_worker_entrypoint")
    if own or context.get("py_executable") != sys.executable:
        return None
    variables: dict[str, str] = context["env_vars"]
    return None if any("$" in value for value in variables.values()) else variables  # Ray expands them


def _become_or_ask_server(folder: Path, preload: str, command: list[str], variables: dict[str, str]) -> bool:
    """Does not return where this process becomes the server; else whether the server has forked the worker."""
    import fcntl
    import hashlib
    import socket

    raylet = os.getppid()
    environment = {**os.environ, **variables}
    key = hashlib.sha256(json.dumps([raylet, sorted(environment.items())]).encode()).hexdigest()[:16]
    address = str(folder / key)
    request = json.dumps([part for part in command[1:] if not part.startswith((CONTEXT, "--language="))])
    with socket.socket(socket.AF_UNIX) as client, Path(f"{address}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several first calls at once one becomes the server
        try:
            client.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            Path(address).unlink(missing_ok=True)
            server = socket.socket(socket.AF_UNIX)
            server.bind(address)
            server.listen(64)
            os.set_inheritable(server.fileno(), True)
            serve = [sys.executable, __file__, "--serve", str(server.fileno()), str(raylet), preload, request]
            os.execve(sys.executable, serve, environment)
        socket.send_fds(client, [request.encode() + b"\0"], [0, 1, 2])
        return bool(client.recv(1))


def serve(listener: int, raylet: int, preload: str, first: list[str]) -> list[str]:
    """Forks workers until the raylet ends, whose end is theirs.

    Returns:
        in each of the workers: its command line.
    """
    import gc
    import select
    import signal
    import socket

    server = socket.socket(fileno=listener)
    watched = os.pidfd_open(raylet)
    workers: dict[int, int] = {}
    poll = select.poll()
    poll.register(server, select.POLLIN)
    poll.register(watched, select.POLLIN)
    if not (_imported(preload) and _may_fork()):  # this process is the first worker then, and serves no other
        server.close()
        return first
    gc.freeze()  # so that the collector of a worker does not touch, and copy, what all share

    def fork() -> bool:
        """Whether this is the worker."""
        if pid := os.fork():
            workers[fd := os.pidfd_open(pid)] = pid
            poll.register(fd, select.POLLIN)
            return False
        os.setpgid(0, 0)  # Ray ends a worker's whole process group
        for fd in (watched, *workers):
            os.close(fd)
        server.close()
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()  # from the system's entropy, as in a new process
        return True

    if fork():
        return first
    while True:
        for fd, _ in poll.poll():
            if fd == watched:
                for worker in workers:
                    signal.pidfd_send_signal(worker, signal.SIGKILL)
                os._exit(0)
            elif fd in workers:
                poll.unregister(fd)
                os.waitpid(workers.pop(fd), 0)
                os.close(fd)
            else:
                client, _ = server.accept()
                request, streams = b"", list[int]()
                with contextlib.suppress(OSError):  # a client that is gone
                    request, streams, _, _ = socket.recv_fds(client, 2**20, 3)
                    while request and not request.endswith(b"\0"):
                        request += client.recv(2**20)
                if request and fork():
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                        os.close(stream)
                    client.close()
                    return list(json.loads(request[:-1]))
                for stream in streams:
                    os.close(stream)
                with contextlib.suppress(OSError):
                    client.send(b"1")
                client.close()


def _imported(preload: str) -> bool:
    """Whether the modules are imported now; a worker that needs one that is missing says so itself."""
    import importlib

    try:
        with importlib.import_module("pipeline.cluster.ray_internals").no_random_ids():
            for module in preload.split(","):
                importlib.import_module(module)
    except ImportError:
        return False
    return True


def _may_fork() -> bool:
    """Whether processes that are forked from this one give different ids to what they make, and may use the GPU."""
    import ray

    opened = [str(Path(file.path).resolve()) for file in os.scandir("/proc/self/fd")]
    if any(file.startswith("/dev/nvidia") for file in opened):  # CUDA has begun, and would not begin again
        return False
    ids = set()
    for _ in range(2):
        end, start = os.pipe()
        if not (pid := os.fork()):
            os.write(start, ray.ObjectRef.from_random().binary())
            os._exit(0)
        os.waitpid(pid, 0)
        ids.add(os.read(end, 1024))
        os.close(end)
        os.close(start)
    return len(ids) == 2


def _work(command: list[str]) -> None:
    """Runs Ray's worker in this process, as Python would."""
    import runpy

    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        listener, raylet, preload = sys.argv[2:5]
        first = json.loads(sys.argv[5])
        sys.path[0] = str(Path(first[0]).parent)  # where Ray's own worker has it when its imports begin
        _work(serve(int(listener), int(raylet), preload, first))
    else:
        main()
