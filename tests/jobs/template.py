"""A process that has done most imports, from which the tests fork jobs and the fork servers of Ray nodes.

A new Python takes seconds of a core to import torch, pandas and MLflow. The template has imported nothing of Ray or of
this project: Ray's core reads the environment on import, and a submitted job brings its own code. A process that it
forks gets everything else that a new Python would get from its caller: environment, search path, working directory,
niceness and open files.

This file is the program, called in two ways. The test process's side is forked.py.

    --template DESCRIPTOR     is the template, which listens on a socket
    ADDRESS FOLDER PRELOAD    forkserver.py for a raylet, but its server is forked from the template at ADDRESS
"""

import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

FORKSERVER = Path(__file__).parents[2] / "pipeline" / "cluster" / "forkserver.py"
# What takes long of what jobs and Ray's workers import.
PRELOAD = [
    "torch", "pandas", "pyarrow.parquet", "pyarrow.dataset", "scipy.linalg", "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store", "fsspec", "grpc", "jsonschema", "PIL.Image", "prometheus_client",
    "pydantic.v1.fields", "rich.console", "rich.live", "starlette.datastructures",
]  # fmt: skip


def ask(address: str, files: list[int], **request: Any) -> tuple[int, socket.socket]:
    """Ask the template at `address` for a process.

    Args:
        address: path of its socket.
        files: descriptors that the process gets as its standard streams, and as further ones from 3 on.
        request: arguments of `_become`.

    Returns:
        its id, and a socket from which `read_number` will read its exit code.
    """
    client = socket.socket(socket.AF_UNIX)
    client.connect(address)
    socket.send_fds(client, [b"\n"], files)
    client.sendall(json.dumps(request).encode() + b"\n")
    return read_number(client), client


def read_number(answers: socket.socket) -> int:
    """Read one of the template's two answers: a process's id, then its exit code."""
    received = answers.recv(4)
    assert received, "the template has ended"
    return int.from_bytes(received, signed=True)


def _write_number(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody waits for a fork server's end
        client.sendall(number.to_bytes(4, signed=True))


def _serve(listener: int) -> None:
    """Fork a process for each caller, until the process that started this one has ended."""
    import gc
    import importlib
    import select
    import signal

    gc.disable()
    for module in PRELOAD:
        importlib.import_module(module)
    gc.enable()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test process
    server = socket.socket(fileno=listener)
    children: dict[int, tuple[int, socket.socket]] = {}
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(server, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == 0:
                os._exit(0)
            elif fd in children:
                pid, client = children.pop(fd)
                poll.unregister(fd)
                os.close(fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                _write_number(client, code)
                client.close()
            else:
                client, _ = server.accept()
                _, files, _, _ = socket.recv_fds(client, 1, 16)
                with client.makefile("r") as requests:
                    request = json.loads(requests.readline())
                if pid := os.fork():
                    _write_number(client, pid)
                    children[child := os.pidfd_open(pid)] = pid, client
                    poll.register(child, select.POLLIN)
                    for file in files:
                        os.close(file)
                else:
                    for child, (_, other) in children.items():
                        os.close(child)
                        other.close()
                    server.close()
                    client.close()
                    _become(files, **request)


def _become(
    files: list[int], words: list[str], environment: dict[str, str], folder: str, niceness: int, name: str
) -> None:
    """Run a Python program in this process, as a new Python would, and exit.

    Only OMP_NUM_THREADS stays the template's, since torch reads it on import. It is the same in all tests.

    Args:
        files: its descriptors, see `ask`.
        words: the program and its arguments.
        name: the name by which `ps` shows the process; at most 15 characters.
    """
    import atexit
    import ctypes
    import runpy
    import signal
    import warnings

    os.setsid()
    ctypes.CDLL(None).prctl(15, name.encode())  # PR_SET_NAME
    os.nice(niceness - os.nice(0))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    former = os.environ.get("PYTHONPATH", "").split(":")
    os.environ.clear()
    os.environ.update(environment)
    if environment.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    search = [place for place in sys.path[1:] if place not in former]
    named = [place for place in environment.get("PYTHONPATH", "").split(":") if place]
    sys.path[:] = [str(Path(words[0]).parent), *named, *search]
    sys.argv = words
    code: int | None = 1
    try:
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forkserver(address: str) -> None:
    """Do as forkserver.py does, but let the template fork what would become the server."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("forkserver", FORKSERVER)
    assert spec and spec.loader
    forkserver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(forkserver)

    def fork_server(python: str, command: list[str], environment: dict[str, str]) -> None:
        _, program, serve, listener, *rest = command
        ask(
            address, [0, 1, 2, int(listener)], words=[program, serve, "3", *rest], environment=environment,
            folder=str(Path.cwd()), niceness=os.nice(0), name=f"of-{os.getppid()}",
        )  # fmt: skip
        os._exit(0)

    os.execve = fork_server  # type: ignore[assignment]
    forkserver.main()


if __name__ == "__main__":
    if sys.argv[1] == "--template":
        _serve(int(sys.argv[2]))
    else:
        address = sys.argv.pop(1)
        _forkserver(address)
