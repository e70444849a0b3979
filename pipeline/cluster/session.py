"""Joining or starting Ray, quietly."""

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.cluster.forking import forked_workers, start_server
from pipeline.cluster.joining import check_joinable
from pipeline.display import quieten, redirected
from pipeline.errors import InputError, Outage
from pipeline.redact import one_line

PACKAGE = Path(__file__).parents[1]
# Ray reads these when it is imported or when its workers start.
_QUIET = {
    "RAY_DEDUP_LOGS": "1",
    # Ray Data's own actor pools make Ray's core print an error that is none.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    # The core warns of four times as many processes as this (else the CPUs), many of which only wait here.
    "RAY_worker_maximum_startup_concurrency": "8",
}
_SETTINGS = {
    # Seconds for which a dead worker goes unnoticed, and a finished one is waited for.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Ray Train gives this to its own workers: with it here, they and all others have the same environment and are
    # forked from one process (forkserver.py).
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    # Workers that Ray starts in case they are needed have no runtime environment, and all of ours have one.
    "RAY_prestart_worker_first_driver": "0",
}


START_TIMEOUT = (
    "timed out during startup"  # in the message of what `ray.init` raises, which has no type of its own
)
# Of a Ray that a job starts for itself. Its one node never gets a notice, and nobody looks at the node's figures.
_OWN_RAY = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}


def spilled_bytes() -> int:
    """Bytes that the object stores of all nodes have spilled to disk so far; 0 where nobody answers."""
    import ray

    from pipeline.cluster.ray_internals import get_memory_info_reply, get_state_from_address

    try:
        address = ray.get_runtime_context().gcs_address
        reply = get_memory_info_reply(get_state_from_address(address), timeout_seconds=5.0)
    except Exception:  # a node is going down: a figure for a curve is worth no failure
        return 0
    return int(reply.store_stats.spilled_bytes_total)


def connect(
    verbose: bool = False,
    environment: dict[str, str] | None = None,
    preload: str = "ray.data",
    server: Path | None = None,
) -> None:
    """Joins the cluster at RAY_ADDRESS, or starts a Ray of this process's own on this machine.

    Args:
        verbose: let Ray's own logs and progress bars through.
        environment: variables that every worker gets.
        preload: modules that workers of a Ray that is started here need, separated by commas.
        server: see `forking.forked_workers`.

    Raises:
        InputError: no cluster at RAY_ADDRESS can be joined, or no Ray started in the folder for temporary files.
        Outage: nothing answers at RAY_ADDRESS, or a Ray of this process's own did not start in time.
    """
    _set_variables(verbose)
    if not verbose:
        warnings.filterwarnings("ignore", category=FutureWarning)
    import ray
    from ray.data import DataContext

    from pipeline.cluster.pace import set_pace
    from pipeline.cluster.ray_internals import kill_without_asking, silence_published_errors, small_nodes

    if not ray.is_initialized():
        address = _address()
        if address:
            check_joinable(address)
        options: dict[str, Any] = {
            "log_to_driver": verbose,
            "logging_level": logging.INFO if verbose else logging.ERROR,
            "configure_logging": True,
            "runtime_env": {"env_vars": _worker_environment(environment or {})},
        }
        if not address:
            options |= {"address": "local", "include_dashboard": False}
        try:
            with (
                contextlib.nullcontext() if verbose else _muted(),
                contextlib.nullcontext() if address else forked_workers(preload, server),
                contextlib.nullcontext() if address or verbose else small_nodes(),
                _deaf_to_sigterm(),
            ):
                ray.init(**options)
        except ConnectionError as error:
            raise Outage(f"no Ray cluster answers at RAY_ADDRESS={address}: {one_line(error)}") from None
        except Exception as error:
            if address or not (isinstance(error, OSError) or START_TIMEOUT in str(error)):
                raise
            if START_TIMEOUT in str(error):
                raise Outage(
                    "Ray did not start on this machine within half a minute: it is too busy, or short of memory; "
                    "run the same command again once it is not"
                ) from None
            place = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
            raise InputError(
                f"Ray can't start in {place}/ray: {one_line(error)}; RAY_TMPDIR names a folder for it, on a short path"
            ) from None
        if not address:
            kill_without_asking()
    context = DataContext.get_current()
    set_pace(context)
    if not verbose:
        quieten()
        silence_published_errors()
        context.enable_progress_bars = False
        context.enable_operator_progress_bars = False
        context.print_on_execution_start = False


def connect_later(verbose: bool, environment: dict[str, str], preload: str, soon: bool = True) -> None:
    """What `connect_now` does from now on, whoever needs Ray first: see `connect`.

    Args:
        soon: Ray will be needed. Where it is started here, its workers' modules begin to be imported at once.
    """
    global _connect
    _set_variables(verbose)
    has_ray = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    early = soon and not has_ray and not _address()
    server = start_server(preload, _worker_environment(environment)) if early else None
    _connect = partial(connect, verbose, environment, preload, server)


def connect_now() -> None:
    """Joins or starts Ray as this process's job does, where it has not yet done so."""
    _connect()


_connect: Callable[[], None] = connect


def _set_variables(verbose: bool) -> None:
    settings = _SETTINGS | ({} if verbose else _QUIET) | ({} if _address() else _OWN_RAY)
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _address() -> str:
    """Of the cluster to join; empty where this process starts a Ray of its own."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address  # Ray's own word for one of this process's own


def is_own_ray() -> bool:
    """Whether this process has started the Ray that it uses: no other node will ever join that."""
    from pipeline.cluster.ray_internals import global_worker

    node = global_worker.node
    return node is not None and bool(node.is_head())


def checkout() -> Path | None:
    """The working tree that this code runs from; None where the package is installed."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() else None


def submitted_settings() -> dict[str, Any]:
    """The runtime environment of the job that this process is the driver of; empty for one that nobody submitted."""
    settings = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env")
    return settings or {}


def disconnect() -> None:
    """Leaves the cluster, or ends the Ray that `connect` started."""
    if ray := sys.modules.get("ray"):
        ray.shutdown()


@contextlib.contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """Processes that are started inside do not hear SIGTERM; this one hears it afterwards.

    SLURM, systemd and `timeout` send it to every process of a job. Ray's would die of it before the driver has saved.
    Ray itself does the same for SIGINT.
    """
    handler = signal.getsignal(signal.SIGTERM)
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        # Ray has put its own there, which exits with code 1; a thread can't change that.
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Keeps stderr back; it is shown only if what is inside fails.

    Ray's core announces there, in a line that no setting stops, that it was told to be quiet.
    """
    with tempfile.TemporaryFile() as kept, redirected(2, kept.fileno()) as real:
        try:
            yield
        except Exception as error:
            if not isinstance(error, OSError):
                kept.seek(0)
                os.write(real, kept.read())
            raise


def _worker_environment(environment: dict[str, str]) -> dict[str, str]:
    """What workers get beside their nodes' own environment."""
    job = submitted_settings()
    # A submitted job's tree is on every node already, and Ray refuses to be told a variable twice.
    path = os.pathsep.join(filter(None, [str(checkout() or ""), os.environ.get("PYTHONPATH")]))
    if "working_dir" not in job and path:
        environment = {"PYTHONPATH": path, **environment}
    return {name: value for name, value in environment.items() if name not in job.get("env_vars", {})}
