"""An actor that tells about its process. This module imports little, because every worker that is asked imports it."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray


@ray.remote(num_cpus=0)
class Worker:
    def pids(self) -> tuple[int, int]:
        """Return the ids of this process and its parent."""
        return os.getpid(), os.getppid()

    def about(self) -> dict[str, Any]:
        """Return what a library can see of its process, except the ids."""
        import resource

        ids = ("RAY_RAYLET_PID", "OMP_NUM_THREADS")
        return {
            "environment": {name: value for name, value in os.environ.items() if name not in ids},
            "sys.path": sys.path,
            "argv": [word.partition("=")[0] for word in sys.argv],
            "executable": sys.executable,
            "prefix": sys.prefix,
            "folder": Path.cwd(),
            "leads its group": os.getpgid(0) == os.getpid(),
            "niceness": os.nice(0),
            "signals": [
                signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGPIPE)
            ],
            "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
            "limits": [resource.getrlimit(limit) for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)],
            "main": sys.modules["__main__"].__name__,
        }

    def imported(self) -> list[str]:
        """Return the names of all modules, in the order in which they were imported."""
        return list(sys.modules)

    def drawn(self) -> tuple[Any, ...]:
        """Return one draw of every generator of ids or random numbers in a worker."""
        import random
        import uuid

        import numpy
        from ray.util.placement_group import placement_group, remove_placement_group

        # A byte, since Ray may lose what a group reserves that is removed while it is made.
        group = placement_group([{"memory": 1}])
        remove_placement_group(group)
        legacy = numpy.random.random()  # noqa: NPY002  (the one that every process has)
        return (
            group.id.hex(), ray.ObjectRef.from_random().hex(), uuid.uuid4(), random.random(), float(legacy),
            float(numpy.random.default_rng().random()),
        )  # fmt: skip


def own_python(environment: dict[str, Any] | None = None) -> Any:
    """Start a worker with another program than the fork server's, which Ray therefore has to start itself."""
    program = {"py_executable": f"{sys.executable} -u"}
    return Worker.options(runtime_env={**(environment or {}), **program}).remote()
