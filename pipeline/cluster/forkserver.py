"""Forks Ray's worker processes from one process that has already imported the libraries.

Normally each worker of Ray is a new Python that imports Ray, Ray Data, Ray Train and torch. That takes three to eight
seconds of a core, and a training run starts ten of them. A job that starts its own Ray gives it this program in place of
Python (`forking.forked_workers`). Ray's raylet calls it with a worker's command line:

    first call      becomes the server: it imports the modules, forks the worker and stays
    later calls     ask the server to fork, and end
    other programs  become Python: the dashboard's agent and whatever else Ray starts

A job that knows early what its workers need starts the server itself (`forking.start_server`). Its imports then run
beside the job's own imports and beside Ray's start, and the raylet's first call finds it waiting.

A server serves one raylet, and only calls with the same environment, because libraries read the environment when they are
imported. So a forked worker equals a started one. The worker's runtime environment counts as well. A worker whose runtime
environment has more than variables and a working directory (a package, a container) gets its own Python. The server
ends with its raylet, and the workers end with the server. This needs Linux; elsewhere every worker is a new Python.

This file is the program, so it imports only the standard library, and only when needed. The driver's side is forking.py.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

SETUP = "setup_worker.py"
CONTEXT = "--serialized-runtime-env-context="
# The raylet's process id. Ray's core reads it once, when it is imported, and ends when that process ends. A server that
# no raylet has called yet sets its own id, because it ends with the raylet as well.
RAYLET = "RAY_RAYLET_PID"


def main() -> None:
    """Starts the process that Ray asks for: a worker through the server, any other program directly."""
    folder, preload, *command = sys.argv[1:]
    context = _context(command)
    if context is not None:
        with contextlib.suppress(OSError):
            if _become_or_ask_server(Path(folder), preload, command, *context):
                return
    os.execv(sys.executable, [sys.executable, *command])


def _context(command: list[str]) -> tuple[dict[str, str], str] | None:
    """The variables and the working directory of the worker's runtime environment; None if it needs its own Python."""
    if Path(command[0]).name != SETUP or "--language=PYTHON" not in command:
        return None
    found = [part.removeprefix(CONTEXT) for part in command if part.startswith(CONTEXT)]
    context = json.loads(found[0]) if found else {}
    directory = ""
    match context.get("command_prefix") or []:
        case []:
            pass
        case ["cd", quoted, "&&"]:
            import shlex

            directory = shlex.split(quoted)[0]
        case _:
            return None
    if context.get("override_worker_entrypoint") or context.get("py_executable") != sys.executable:
        return None
    variables: dict[str, str] = context["env_vars"]
    if any("$" in value for value in variables.values()):  # Ray expands them
        return None
    return variables, directory


def _become_or_ask_server(
    folder: Path, preload: str, command: list[str], variables: dict[str, str], directory: str
) -> bool:
    """Asks the server to fork the worker, and returns True if it did. Does not return if this process becomes the server.

    Args:
        command: the worker's command line, without Python.
        variables: variables of the worker's runtime environment.
        directory: the worker's working directory; "" = the raylet's.
    """
    import fcntl
    import socket

    raylet = os.getppid()
    if os.environ.get(RAYLET, str(raylet)) != str(raylet):
        # The raylet is dead. A server would watch the process that adopted this one, and never end.
        os._exit(1)
    environment = {**os.environ, **variables}
    if directory:  # as a shell's `cd` leaves them
        environment |= {"PWD": directory, "OLDPWD": str(Path.cwd())}
        environment.pop("_", None)
    address = str(folder / _key([raylet, directory, sorted(environment.items())]))
    words = [part for part in command[1:] if not part.startswith((CONTEXT, "--language="))]
    request = json.dumps([raylet, words])
    with socket.socket(socket.AF_UNIX) as client, Path(f"{address}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # if several first calls come at once, one becomes the server
        with contextlib.suppress(FileNotFoundError):
            (folder / early_name(environment)).rename(address)  # this raylet takes over the early server
        try:
            client.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            Path(address).unlink(missing_ok=True)
            server = socket.socket(socket.AF_UNIX)
            server.bind(address)
            server.listen(64)
            os.set_inheritable(server.fileno(), True)
            if directory:
                os.chdir(directory)
            serve = server_command(server.fileno(), raylet, preload, str(Path(words[0]).parent), request)
            os.execve(sys.executable, serve, environment)
        socket.send_fds(client, [request.encode() + b"\0"], [0, 1, 2])
        return bool(client.recv(1))


def server_command(listener: int, watched: int, preload: str, folder: str, *first: str) -> list[str]:
    return [sys.executable, __file__, "--serve", str(listener), str(watched), preload, folder, *first]


def _key(content: object) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def early_name(environment: dict[str, str]) -> str:
    """The name of the socket on which a server waits for its first raylet."""
    return _key(sorted((name, value) for name, value in environment.items() if name != RAYLET))


def serve(listener: int, watched: int, preload: str, first: str) -> list[str]:
    """Forks workers until the raylet ends, and then kills them and ends itself.

    Args:
        listener: descriptor of the socket that receives calls.
        watched: id of the process with which the server ends: the raylet, or the driver until the raylet's first call.
        preload: modules to import first, separated by commas.
        first: the call that started this process, as JSON; "" = the server waits for its first call.

    Returns:
        the worker's command line. Only the forked workers return.
    """
    import gc
    import select
    import signal
    import socket

    server = socket.socket(fileno=listener)
    owner, watch = watched, os.pidfd_open(watched)
    workers: dict[int, int] = {}
    poll = select.poll()
    poll.register(server, select.POLLIN)
    poll.register(watch, select.POLLIN)
    if not first:
        os.environ[RAYLET] = str(os.getpid())
    if not (_imported(preload) and _may_fork()):
        server.close()
        if not first:
            os._exit(1)  # the first caller finds no server and becomes one
        return _take(json.loads(first))  # this process becomes the first worker, and serves no other
    gc.freeze()  # so that a worker's garbage collection does not copy shared memory by writing to it

    def fork() -> bool:
        """Forks. Returns True in the worker."""
        if pid := os.fork():
            workers[fd := os.pidfd_open(pid)] = pid
            poll.register(fd, select.POLLIN)
            return False
        os.setpgid(0, 0)  # Ray ends a worker's whole process group
        for fd in (watch, *workers):
            os.close(fd)
        server.close()
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()  # from the system's entropy, as in a new process
        return True

    if first and fork():
        return _take(json.loads(first))
    while True:
        for fd, _ in poll.poll():
            if fd == watch:
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
                with contextlib.suppress(OSError):  # the client has ended
                    request, streams, _, _ = socket.recv_fds(client, 2**20, 3)
                    while request and not request.endswith(b"\0"):
                        request += client.recv(2**20)
                called = json.loads(request[:-1]) if request else None
                if called and called[0] != owner:  # first call: watch the raylet instead of the driver
                    owner = called[0]
                    poll.unregister(watch)
                    os.close(watch)
                    poll.register(watch := os.pidfd_open(owner), select.POLLIN)
                if called and fork():
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                        os.close(stream)
                    client.close()
                    return _take(called)
                for stream in streams:
                    os.close(stream)
                with contextlib.suppress(OSError):
                    client.send(b"1")
                client.close()


def _take(request: list[Any]) -> list[str]:
    """Prepares a worker for its call, and returns the call's command line."""
    raylet, command = request
    os.environ[RAYLET] = str(raylet)
    return list(command)


def _imported(preload: str) -> bool:
    """Imports the modules. Returns False if one is missing; a worker that needs it reports that itself."""
    import gc
    import importlib

    gc.disable()  # it would take a sixth of the imports' time; `serve` freezes what they leave
    try:
        ray_internals = importlib.import_module("pipeline.cluster.ray_internals")
        with ray_internals.no_random_ids():
            for module in preload.split(","):
                importlib.import_module(module)
            for module in ray_internals.WORKER_IMPORTS:
                with contextlib.suppress(ImportError):  # another Ray's workers may not need it
                    importlib.import_module(module)
    except ImportError:
        return False
    finally:
        gc.enable()
    return True


def _may_fork() -> bool:
    """True if forked processes would draw different random ids from Ray, and CUDA is not initialized here."""
    import ray

    opened = [str(Path(file.path).resolve()) for file in os.scandir("/proc/self/fd")]
    if any(file.startswith("/dev/nvidia") for file in opened):  # a forked process can't initialize CUDA again
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
    """Runs Ray's worker script in this process, as Python would."""
    import runpy

    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        listener, watched, preload, sys.path[0], *call = sys.argv[2:]
        _work(serve(int(listener), int(watched), preload, "".join(call)))
    else:
        main()
