"""Sends jobs to a Ray cluster from outside, through Ray's own job API."""

import asyncio
import codecs
import contextlib
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import requests
import tyro

from pipeline.cluster.job_server import connect, read_log
from pipeline.cluster.packing import pack
from pipeline.cluster.session import PACKAGE, checkout
from pipeline.config import load_yaml
from pipeline.errors import InputError, JobFailed, Outage
from pipeline.ranges import Positive, check_ranges
from pipeline.redact import one_line, printable, redact

Job = Literal["prepare", "train", "tune", "generate", "evaluate"]
# Flags that name data. Data is not sent with the tree.
PLACES = "data", "input", "model", "samples", "output"
FINISHED = ("SUCCEEDED", "FAILED", "STOPPED")
# Length of the kept end of a job's output, enough for its result line and its last error.
KEPT_CHARACTERS = 100_000
LOST_SECONDS = 60.0
# Seconds between the signal that stops a job and its end. Training saves a checkpoint first.
STOP_SECONDS = "60"
_SECRET_NAME = re.compile(r"(?i)key|secret|token|password|credential|connection_string")


@dataclass(frozen=True)
class SubmitConfig:
    """The job to run on the cluster. The job's own flags follow after `--`."""

    job: Annotated[Job, tyro.conf.Positional]
    """Job to submit. `ray job status`, `logs`, `stop` and `list` manage it afterwards."""
    address: str = ""
    """Address of Ray's job server (http:// or https://); empty = RAY_ADDRESS, or else http://127.0.0.1:8265."""
    wait: bool = False
    """Show the job's output until it ends, then print its result and exit with its exit code."""
    id: str = ""
    """Submission id; empty = a new one. An id that was used before joins that job, or reports how it ended."""
    forward: tuple[str, ...] = ()
    """Environment variables to pass on to the job, such as MLFLOW_TRACKING_URI; never secrets."""
    include: tuple[str, ...] = ()
    """Files, folders or patterns of the working tree to send beside those that git tracks; never secrets."""
    verify: str = "true"
    """How to check an https:// server: true, false, or a file or folder with certificates of trusted authorities."""
    max_megabytes: Positive = 20
    """Size limit of the working tree that is sent, in megabytes."""


def submit(config: SubmitConfig, flags: list[str]) -> dict[str, Any]:
    """Submits a job, or joins the job that has the same id.

    Args:
        flags: flags of the job itself.

    Returns:
        `output` (empty), `id` and `status`; with `wait` the job's own result line, with `id` and `status`.

    Raises:
        InputError: as `connect`, or a flag can't work on the cluster, or the cluster refuses the job.
        JobFailed: with `wait`, the job failed or was stopped.
    """
    check_ranges(config)
    if config.id and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,127}", config.id):
        raise InputError(
            f"--id {config.id}: give at most 128 letters, digits, '.', '_' and '-', the first one a letter or digit"
        )
    _check_flags(flags)
    client = connect(config.address, config.verify)
    job_id = _submit(client, config, flags)
    print(f"submitted as {job_id}", file=sys.stderr)
    if config.wait:
        return _follow(client, job_id)
    try:
        status = client.get_job_info(job_id).status.value
    except (RuntimeError, OSError):  # the server fails now, but it has the job
        status = "PENDING"
    return {"output": "", "id": job_id, "status": status}


def _check_flags(flags: list[str]) -> None:
    """Refuses flags that can't work on the cluster or that would leak a secret."""
    for flag in flags:
        if redact(flag) != flag:
            raise InputError(
                f"{redact(flag)} holds a secret, and flags are logged: credentials belong to the cluster's environment"
            )
    for name, value in _values(flags):
        if name in PLACES and value and not _is_seen_by_nodes(value):
            raise InputError(
                f"--{name} {printable(value)}: a relative path would be in the job's own copy of the tree, which holds "
                "no data and is deleted: give an absolute path that all nodes see, or a URI"
            )


def _values(flags: list[str]) -> Iterator[tuple[str, str]]:
    """Yields each flag with its first value, those of a --config file included."""
    for flag, following in pairwise([*flags, ""]):
        name, equals, value = flag.partition("=")
        if not name.startswith("--"):
            continue
        name, value = name[2:].replace("_", "-"), value if equals else following
        yield name, value
        if name == "config" and value:
            yield from ((key.replace("_", "-"), str(one)) for key, one in load_yaml(value).items() if one)


def _is_seen_by_nodes(place: str) -> bool:
    return "://" in place or place.startswith(("/", "models:/", "--"))


def _submit(client: Any, config: SubmitConfig, flags: list[str]) -> str:
    """Submits a job, unless one with this id and these flags exists. Returns the job's id."""
    entrypoint = shlex.join(["python", "-m", "pipeline.commands", config.job, *flags])
    job = _find(client, config.id) if config.id else None
    if job is None:
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "tree.zip"
            # An installed package is sent alone, because the environment's other packages lie beside it.
            root = checkout() or PACKAGE
            pack(root, package, config.max_megabytes, base=PACKAGE.parent, include=config.include)
            runtime_env = {"working_dir": str(package), "env_vars": _environment(config.forward)}
            try:
                submitted: str = client.submit_job(
                    entrypoint=entrypoint, submission_id=config.id or None, runtime_env=runtime_env
                )
                return submitted
            except (RuntimeError, OSError) as error:
                # Another process may have submitted a job with the same id first.
                job = _find(client, config.id) if config.id else None
                if job is None:
                    raise InputError(f"the cluster refuses the job: {one_line(error)}") from None
    if job.entrypoint != entrypoint:
        raise InputError(f"--id {config.id} is another job: {redact(job.entrypoint)}; give another --id")
    if job.status.value in ("FAILED", "STOPPED"):
        print(f"{config.id} ended before; give another --id to run it again", file=sys.stderr)
    return config.id


def _environment(names: tuple[str, ...]) -> dict[str, str]:
    """The variables that the job gets from this environment. Anyone with access to the job server can read them."""
    values = {"RAY_JOB_STOP_WAIT_TIME_S": STOP_SECONDS}
    for name in names:
        value = os.environ.get(name)
        if value is None:
            raise InputError(f"--forward {name}: no such variable is set")
        if _SECRET_NAME.search(name) or redact(value) != value:
            raise InputError(
                f"--forward {name}: others can read a job's settings: set the variable on the cluster"
            )
        values[name] = value
    return values


def _find(client: Any, job_id: str) -> Any | None:
    try:
        return client.get_job_info(job_id)
    except (RuntimeError, OSError) as error:
        if "404" in str(error):
            return None
        raise Outage(f"the job server does not answer: {one_line(error)}") from None


def _follow(client: Any, job_id: str) -> dict[str, Any]:
    """Shows a job's output until it ends. Returns the job's result or raises its failure."""
    output = _Output()
    job = output.show(client, job_id)
    status = job.status.value
    if status == "SUCCEEDED":
        return {**output.result(), "id": job_id, "status": status}
    reason = one_line(output.last_line() or job.message or "no output")
    raise JobFailed(f"job {job_id} {status.lower()}: {reason}", _exit_code(job.driver_exit_code))


def _exit_code(code: int | None) -> int:
    """A driver's exit code as a shell gives it: 128 + N for signal N, 1 if it has none."""
    if code is None:
        return 1
    return 128 - code if code < 0 else code or 1


class _Output:
    """Shows a job's output. Each character is shown once, whether it comes from the stream or from the log."""

    def __init__(self) -> None:
        self._shown, self._end = 0, ""

    def show(self, client: Any, job_id: str) -> Any:
        """Shows the output on stderr until the job has ended. Returns the cluster's record of the job.

        Ray's stream of the output does not pass HTTP proxies, breaks, and ends early if the job prints bytes that are
        not UTF-8. So the rest is read from the log.

        Raises:
            InputError: the cluster has not answered for a minute.
        """
        lost_at: float | None = None
        streams, pause = True, 1.0
        while True:
            before, begun = self._shown, time.monotonic()
            if streams:
                with contextlib.suppress(Exception):  # if the stream breaks, the rest is read from the log
                    asyncio.run(self._tail(client, job_id))
                streams = self._shown > before
            try:
                job = client.get_job_info(job_id)
                ended = job.status.value in FINISHED
                asked = time.monotonic()
                with contextlib.suppress(requests.HTTPError):  # there is no log yet, or its node is gone
                    self._show_rest(read_log(client, job_id, job.driver_node_id))
                if ended:
                    return job
                # Each request reads the whole log, so at most a tenth of the time is spent on it.
                lost_at, pause = None, max(1.0, 10 * (time.monotonic() - asked))
            except (RuntimeError, OSError) as error:
                lost_at = lost_at or begun
                if time.monotonic() - lost_at > LOST_SECONDS:
                    raise InputError(
                        f"the job server does not answer ({one_line(error)}), and job {job_id} may still run: "
                        "the same command with its --id joins it again"
                    ) from None
            time.sleep(pause)

    async def _tail(self, client: Any, job_id: str) -> None:
        position = 0
        async for text in client.tail_job_logs(job_id):
            new = text[max(0, self._shown - position) :]
            position += len(text)
            self._print(new)

    def _show_rest(self, log: bytes) -> None:
        """Shows the new part of a whole log. It counts characters as the stream does."""
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(log)
        self._print(text.replace("\r\n", "\n").replace("\r", "\n")[self._shown :])

    def _print(self, new: str) -> None:
        self._shown += len(new)
        self._end = (self._end + new)[-KEPT_CHARACTERS:]
        print(new, end="", file=sys.stderr, flush=True)

    def last_line(self) -> str:
        """The last line that is not empty."""
        return next((line for line in reversed(self._end.splitlines()) if line.strip()), "")

    def result(self) -> dict[str, Any]:
        """The job's own last line on stdout."""
        for line in reversed(self._end.splitlines()):
            if line.startswith("{"):
                try:
                    value: dict[str, Any] = json.loads(line)
                except ValueError:
                    continue
                return value
        return {"output": ""}
