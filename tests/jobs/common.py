"""Run a job as a user would: with its own process, Ray and MLflow database."""

import atexit
import contextlib
import functools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.session import _SETTINGS

ROOT = Path(__file__).parents[2]
# Variables that every driver sets and Ray Train passes on to its workers. If a node has them from its start, one fork
# server on it serves all workers of a job.
OF_TRAINING = {
    name: _SETTINGS[name]
    for name in ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC")
}


@dataclass(frozen=True)
class Outcome:
    code: int
    result: dict[str, Any]
    stdout: str
    stderr: str


def environment(home: Path, **extra: str) -> dict[str, str]:
    """Return the user's environment with MLflow's database in `home`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return kept | {"MLFLOW_TRACKING_URI": database(home), "PYTHONWARNINGS": "ignore"} | extra


def database(home: Path) -> str:
    """Return the URI of MLflow's database in `home`, which is created empty if it doesn't exist."""
    file = home / "mlflow.db"
    if not file.exists():
        shutil.copyfile(_empty_database(), file)
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as copy:
            copy.execute("UPDATE experiments SET artifact_location = ?", [f"{home}/mlruns/0"])
    return f"sqlite:///{file}"


@functools.cache
def _empty_database() -> Path:
    """Return an empty database to copy. MLflow takes seconds to make one, so it makes only one."""
    import mlflow

    folder = tempfile.mkdtemp(prefix="mlflow-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    mlflow.MlflowClient(f"sqlite:///{folder}/empty.db").search_experiments()
    return Path(folder) / "empty.db"


def command(job: str, *flags: object) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *map(str, flags)]


def run_job(job: str, *flags: object, home: Path, timeout: float = 300, **extra: str) -> Outcome:
    """Run `jobs/JOB.py FLAGS` in `home` to its end and return the outcome."""
    return outcome(
        subprocess.run(
            command(job, *flags),
            cwd=home,
            env=environment(home, **extra),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    )


def outcome(done: subprocess.CompletedProcess[str]) -> Outcome:
    """Return the outcome of a job's finished process."""
    return outcome_of(done.returncode, done.stdout, done.stderr)


def outcome_of(code: int, stdout: str, stderr: str) -> Outcome:
    """Return the outcome. A successful job's result is the last line on stdout."""
    lines = stdout.strip().splitlines()
    return Outcome(code, json.loads(lines[-1]) if code == 0 and lines else {}, stdout, stderr)
