"""Jobs sent to a Ray cluster from outside, through Ray's own job API."""

import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline.errors import InputError

JOBS = ("prepare", "train", "tune", "generate", "evaluate")
Action = Literal["prepare", "train", "tune", "generate", "evaluate", "status", "logs", "stop", "list"]
# Never sent, whatever the ignore files say: history, environments, results, anything that smells of a secret.
EXCLUDED = [
    ".git", ".venv", "demo", "runs", "mlruns", "mlartifacts", "*.db", ".env*", "*.pem", "*.key", "tests", "docs",
    "**/__pycache__",
]  # fmt: skip
# Addresses only: credentials belong to the cluster, and reach it as Kubernetes Secrets.
FORWARDED = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL")
FINISHED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class SubmitConfig:
    """What to do on the cluster; flags of the job itself follow after `--`."""

    action: Annotated[Action, tyro.conf.Positional]
    """A job to submit, or what to do with one that was: status, logs, stop (with --id), list."""
    address: str = "http://127.0.0.1:8265"
    """Ray's job server (http:// or https://); RAY_ADDRESS where it is set and this flag is not."""
    id: str = ""
    """Submission id. Submitting the same id again joins the job that runs under it."""
    wait: bool = False
    """Stream the job's output, exit with its exit code and print its result."""


def run(config: SubmitConfig, flags: list[str]) -> dict[str, Any]:
    """Submits a job, or asks about one.

    Returns:
        for a job with `wait`, its own result line; else `id` and `status`.

    Raises:
        InputError: nothing answers at the address, no such job, or the job failed.
    """
    client = _client(config)
    if config.action == "list":
        for job in client.list_jobs():
            print(f"{job.submission_id}  {job.status.value}  {job.entrypoint}", file=sys.stderr)
        return {"output": "", "count": len(client.list_jobs())}
    if config.action in JOBS:
        return _submit(client, config, flags)
    if not config.id:
        raise InputError(f"{config.action} needs --id; `jobs/submit.py list` shows the ids")
    try:
        if config.action == "logs":
            print(client.get_job_logs(config.id), file=sys.stderr)
        elif config.action == "stop":
            client.stop_job(config.id)
        return {"output": "", "id": config.id, "status": client.get_job_status(config.id).value}
    except RuntimeError:
        raise InputError(f"--id {config.id}: the cluster knows no such job") from None


def _client(config: SubmitConfig) -> Any:
    from ray.job_submission import JobSubmissionClient

    address = config.address
    if address == SubmitConfig.address and os.environ.get("RAY_ADDRESS", "").startswith("http"):
        address = os.environ["RAY_ADDRESS"]
    if not address.startswith(("http://", "https://")):
        raise InputError(f"--address {address}: expected http://HOST:8265 or https://HOST")
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"no Ray job server answers at {address}: {reason}") from None


def _submit(client: Any, config: SubmitConfig, flags: list[str]) -> dict[str, Any]:
    root = Path(__file__).parents[1]
    known = {job.submission_id for job in client.list_jobs()} if config.id else set()
    job_id = config.id
    if not job_id or job_id not in known:
        job_id = client.submit_job(
            entrypoint=shlex.join(["python", f"jobs/{config.action}.py", *flags]),
            submission_id=config.id or None,
            runtime_env={
                "working_dir": str(root),
                "excludes": EXCLUDED,
                "env_vars": {name: os.environ[name] for name in FORWARDED if name in os.environ},
            },
        )
    print(f"submitted as {job_id}", file=sys.stderr)
    if not config.wait:
        return {"output": "", "id": job_id, "status": client.get_job_status(job_id).value}
    shown = 0
    while True:
        status = client.get_job_status(job_id).value
        logs = client.get_job_logs(job_id)
        print(logs[shown:], end="", file=sys.stderr, flush=True)
        shown = len(logs)
        if status in FINISHED:
            break
        time.sleep(1.0)
    if status != "SUCCEEDED":
        last = next((line for line in reversed(logs.splitlines()) if line.strip()), "no output")
        raise InputError(f"job {job_id} {status.lower()}: {last[:300]}")
    return {**_result(logs), "id": job_id, "status": status}


def _result(logs: str) -> dict[str, Any]:
    """The job's own last line on stdout."""
    for line in reversed(logs.splitlines()):
        if line.startswith("{"):
            try:
                value: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            return value
    return {"output": ""}
