"""Joins or starts Ray without its log output."""

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
# Variables that keep Ray quiet. It reads them when it is imported or when its workers start.
_QUIET = {
    "RAY_DEDUP_LOGS": "1",
    # Ray Data's own actor pools make Ray's core print a false error.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    # Ray's core warns if it has four times as many processes as this (default: the CPUs). Many of ours only wait.
    "RAY_worker_maximum_startup_concurrency": "8",
}
_SETTINGS = {
    # Seconds between two checks for dead and finished workers.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Seconds after which others get the places that Ray Data reserved for a driver that was killed. It repeats its
    # request every ten seconds, and would keep them for three minutes.
    "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "60",
    # Ray Train sets this for its own workers. Set here too, all workers have the same environment and are forked from
    # one process (forkserver.py).
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    # Ray would start spare workers without a runtime environment, but all our workers have one.
    "RAY_prestart_worker_first_driver": "0",
}


# Part of the message that `ray.init` raises, as a bare Exception, if Ray does not start in time.
START_TIMEOUT = "timed out during startup"
START_SECONDS = 120.0
# Variables for a Ray that a job starts for itself. Its node gets no preemption notices, and nobody reads its figures.
_OWN_RAY = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # Milliseconds after which a node ends that can't reach its agent for runtime environments. Default: 30 s.
    "RAY_agent_register_timeout_ms": "120000",
}


def spilled_bytes() -> int:
    """Bytes that the object stores of all nodes have spilled to disk so far; 0 if Ray does not answer."""
    import ray

    from pipeline.cluster.ray_internals import get_memory_info_reply, get_state_from_address

    try:
        address = ray.get_runtime_context().gcs_address
        reply = get_memory_info_reply(get_state_from_address(address), timeout_seconds=5.0)
    except Exception:  # a node is shutting down, and a missing figure must not end the run
        return 0
    return int(reply.store_stats.spilled_bytes_total)


def connect(
    verbose: bool = False,
    environment: dict[str, str] | None = None,
    preload: str = "pipeline.training.worker",
    server: Path | None = None,
) -> None:
    """Joins the cluster at RAY_ADDRESS, or starts Ray on this machine for this process.

    Args:
        verbose: True shows Ray's own logs and progress bars.
        environment: variables that every worker gets.
        preload: modules that the workers need, separated by commas; a Ray that starts here imports them once.
        server: folder from `forking.start_server`.

    Raises:
        InputError: the cluster at RAY_ADDRESS can't be joined, or Ray can't start in the folder for temporary files.
        Outage: nothing answers at RAY_ADDRESS, or Ray did not start in time on this machine.
    """
    _set_variables(verbose)
    if not verbose:
        warnings.filterwarnings("ignore", category=FutureWarning)
    import ray
    from ray.data import DataContext

    from pipeline.cluster.pace import set_pace
    from pipeline.cluster.ray_internals import (
        kill_without_asking,
        patient_start,
        silence_published_errors,
        small_nodes,
    )

    if not ray.is_initialized():
        address = cluster_address()
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
                contextlib.nullcontext() if address else patient_start(START_SECONDS),
                _deaf_to_sigterm(),
            ):
                ray.init(**options)
        except ConnectionError as error:
            raise Outage(f"no Ray cluster answers at RAY_ADDRESS={address}: {one_line(error)}") from None
        except OSError as error:
            if address:
                raise
            place = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
            raise InputError(
                f"Ray can't start in {place}/ray: {one_line(error)}; RAY_TMPDIR names a folder for it, on a short path"
            ) from None
        except Exception as error:
            if address or START_TIMEOUT not in str(error):
                raise
            raise Outage(
                f"Ray did not start on this machine in {START_SECONDS:g} s: it is too busy or short of memory; "
                "run the same command again later"
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
    """Sets the arguments of `connect` for the first `connect_now`.

    Args:
        soon: True if Ray will be needed in any case. A Ray that starts here then imports its workers' modules at once.
    """
    global _connect
    _set_variables(verbose)
    has_ray = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    early = soon and not has_ray and not cluster_address()
    server = start_server(preload, _worker_environment(environment)) if early else None
    _connect = partial(connect, verbose, environment, preload, server)


def connect_now() -> None:
    """Joins or starts Ray with the arguments of `connect_later`, unless that is done already."""
    _connect()


_connect: Callable[[], None] = connect


def _set_variables(verbose: bool) -> None:
    settings = _SETTINGS | ({} if verbose else _QUIET) | ({} if cluster_address() else _OWN_RAY)
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def cluster_address() -> str:
    """The address of the cluster to join; "" if this process starts its own Ray."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address  # "local" also asks Ray for one of this process's own


def is_own_ray() -> bool:
    """True if this process started the Ray that it uses. No other node joins such a Ray."""
    from pipeline.cluster.ray_internals import global_worker

    node = global_worker.node
    return node is not None and bool(node.is_head())


def checkout() -> Path | None:
    """The working tree that this code runs from; None if the package is installed."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() else None


def submitted_settings() -> dict[str, Any]:
    """The runtime environment of the submitted job whose driver this process is; {} if the job was not submitted."""
    settings = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env")
    return settings or {}


def disconnect() -> None:
    """Leaves the cluster, or ends the Ray that `connect` started."""
    if ray := sys.modules.get("ray"):
        ray.shutdown()


@contextlib.contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """Processes that start inside this context block SIGTERM. This process receives it afterwards.

    SLURM, systemd and `timeout` send SIGTERM to every process of a job. It would end Ray's processes before the driver
    has saved. Ray itself does the same for SIGINT.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    handler, register, heard = signal.getsignal(signal.SIGTERM), signal.signal, list[int]()
    ours = callable(handler) and threading.current_thread() is threading.main_thread()

    def keep(number: int, action: Any) -> Any:
        """`ray.init` would install a handler of its own, which exits with code 15."""
        return handler if number == signal.SIGTERM else register(number, action)

    try:
        if ours:
            # The mask is that of this thread. Another thread may take the signal.
            register(signal.SIGTERM, lambda number, frame: heard.append(number))
            signal.signal = keep  # type: ignore[assignment]
        yield
    finally:
        if ours:
            signal.signal = register
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
        if heard:
            signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Holds back stderr, and shows it only if the work inside fails.

    Ray's core prints a line there about its reduced log level, and no setting stops that line.
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
    """The variables that workers get beside their nodes' own environment."""
    job = submitted_settings()
    # A submitted job's tree is on every node already, and Ray refuses a variable that is set twice.
    path = os.pathsep.join(filter(None, [str(checkout() or ""), os.environ.get("PYTHONPATH")]))
    if "working_dir" not in job and path:
        environment = {"PYTHONPATH": path, **environment}
    return {name: value for name, value in environment.items() if name not in job.get("env_vars", {})}
