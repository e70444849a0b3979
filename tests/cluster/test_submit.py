"""Submission refuses bad input before it asks a cluster, and follows a job over a connection that breaks."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests

from pipeline.cluster import submit
from pipeline.cluster.job_server import connect
from pipeline.cluster.submit import SubmitConfig
from pipeline.errors import InputError, JobFailed, Outage
from tests.cluster.test_job_server import ray_like, server

CONFIG = "a file that says --data runs/digits"
LOG = "one\ntwo\nthree\n" + '{"output": "s3://b/x", "count": 3}\n'


class BreakingClient:
    """A job server whose connection breaks repeatedly, each time later in the log."""

    def __init__(self, status: str = "SUCCEEDED", code: int | None = 0, breaks: int = 3) -> None:
        self.asked, self.breaks = 0, breaks
        self.job = SimpleNamespace(
            status=SimpleNamespace(value=status),
            driver_exit_code=code,
            message="its own message",
            driver_node_id="n",
        )

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.asked += 1
        if self.asked > self.breaks:
            yield LOG[:8]
            yield LOG[8:]
            return
        yield LOG[: 5 * self.asked]
        raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        if self.asked <= self.breaks:
            raise RuntimeError("the server is away")
        return self.job

    def _do_request(self, method: str, path: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(content=LOG.encode(), raise_for_status=lambda: None)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)


def test_a_stream_that_breaks_is_joined_again_and_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    client = BreakingClient()
    assert submit._follow(client, "a") == {
        "output": "s3://b/x", "count": 3, "id": "a", "status": "SUCCEEDED"
    }  # fmt: skip
    assert client.asked == 4
    assert capsys.readouterr().err == LOG


def test_a_server_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "LOST_SECONDS", 0.05)
    with pytest.raises(InputError, match=r"job server does not answer .* job a may still run"):
        submit._follow(BreakingClient(breaks=10**9), "a")


class Jobs:
    """A job server without streams, as behind an HTTP proxy. `logs` holds the log at each request."""

    def __init__(self, *logs: bytes) -> None:
        self.logs, self.asked = logs, 0

    def __call__(self, path: str) -> tuple[int, str | bytes]:
        if path.startswith("/api/v0/logs/file"):
            assert "node_id=n1" in path and "filename=job-driver-a.log" in path
            self.asked += 1
            return 200, self.logs[self.asked - 1]
        if path == "/api/jobs/a":
            status = "SUCCEEDED" if self.asked == len(self.logs) - 1 else "RUNNING"
            told = {"type": "SUBMISSION", "entrypoint": "x", "status": status, "driver_node_id": "n1"}
            return 200, json.dumps(told | {"submission_id": "a", "driver_exit_code": 0})
        return ray_like(path)


def test_without_a_stream_what_is_new_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job prints bytes that aren't UTF-8, a character cut in two, and a progress bar."""
    first = b"10%\r20%\r\xff\xfe \xc3"
    whole = first + b'\xa9\r\n{"output": "/x"}\n'
    jobs = Jobs(b"", first, whole, whole)
    with server(jobs) as proxy:
        # Ray's stream bypasses the proxy, and only the proxy knows the host.
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        client = connect("http://ray.invalid:8265")
        assert submit._follow(client, "a") == {"output": "/x", "id": "a", "status": "SUCCEEDED"}
    assert jobs.asked == 4
    assert capsys.readouterr().err == '10%\n20%\n\ufffd\ufffd \u00e9\n{"output": "/x"}\n'


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("FAILED", 3, 3), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 1)],
)
def test_a_job_that_fails_gives_its_own_exit_code(status: str, code: int | None, expected: int) -> None:
    with pytest.raises(JobFailed, match=f"job a {status.lower()}") as caught:
        submit._follow(BreakingClient(status, code, breaks=0), "a")
    assert caught.value.code == expected


@pytest.mark.parametrize(
    ("config", "flags", "complaint"),
    [
        (SubmitConfig("train"), ["--data", "s3://me:planted@b/x"], r"\*\*\*@b/x holds a secret"),
        (SubmitConfig("train"), ["--output", "runs/x"], "--output runs/x: a relative path"),
        (SubmitConfig("train"), ["--output=runs/x"], "--output runs/x: a relative path"),
        (
            SubmitConfig("train"),
            ["--data", "runs/digits", "--output", "/x"],
            "--data runs/digits: a relative path",
        ),
        (SubmitConfig("prepare"), ["--input=~/images"], "--input ~/images: a relative path"),
        (SubmitConfig("evaluate"), ["--model", "./model"], "--model ./model: a relative path"),
        (SubmitConfig("evaluate"), ["--samples", "."], r"--samples \.: a relative path"),
        (SubmitConfig("train"), ["--config", CONFIG], "--data runs/digits: a relative path"),
        (SubmitConfig("train"), ["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (SubmitConfig("train", id="../x"), [], r"--id \.\./x: give at most 128 letters"),
    ],
)
def test_what_cannot_work_is_refused_before_a_cluster_is_asked(
    config: SubmitConfig, flags: list[str], complaint: str, tmp_path: Path
) -> None:
    saved = tmp_path / "run.yaml"
    saved.write_text("steps: 5\noutput: /x\ndata: runs/digits\n")
    flags = [str(saved) if word == CONFIG else word for word in flags]
    with pytest.raises(InputError, match=complaint) as caught:
        submit.submit(config, flags)
    assert "planted" not in str(caught.value)


def test_places_that_nodes_see_are_let_through() -> None:
    submit._check_flags(
        [
            "--data",
            "s3://b/x",
            "--output=/results/x",
            "--model",
            "models:/a/1",
            "--resume",
            "--source",
            "digits",
        ]
    )
    submit._check_flags(["--model", "models:/a@best", "--samples", "", "--data", "hf://datasets/a/b"])


def test_only_variables_that_others_may_read_are_forwarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "planted")
    monkeypatch.setenv("DATABASE", "postgresql://me:planted@db/x")
    assert submit._environment(("MLFLOW_TRACKING_URI",))["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert not {"AWS_ACCESS_KEY_ID", "DATABASE"} & submit._environment(()).keys()
    for name, complaint in (
        ("AWS_ACCESS_KEY_ID", "others can read"), ("DATABASE", "others can read"), ("ABSENT", "no such")
    ):  # fmt: skip
        with pytest.raises(InputError, match=complaint) as caught:
            submit._environment((name,))
        assert "planted" not in str(caught.value)


class FailingClient:
    """A job server that takes jobs, and answers every question with 503."""

    submitted = 0

    def submit_job(self, **_: object) -> str:
        self.submitted += 1
        return "a"

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        raise RuntimeError("Request failed with status code 503: no healthy upstream")


def test_a_job_is_submitted_even_if_the_server_then_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FailingClient()
    monkeypatch.setattr(submit, "connect", lambda address, verify: client)
    config = SubmitConfig("prepare")
    assert submit.submit(config, []) == {"output": "", "id": "a", "status": "PENDING"}
    # Whether an id was used before can't be told, so nothing is submitted.
    with pytest.raises(Outage, match=r"the job server does not answer: .*503"):
        submit.submit(replace(config, id="a"), [])
    assert client.submitted == 1


@pytest.mark.parametrize("error", [RuntimeError("status code 500"), requests.ConnectionError("reset")])
def test_a_server_that_fails_at_the_submission_gets_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> str:
        raise error

    monkeypatch.setattr(submit, "connect", lambda address, verify: SimpleNamespace(submit_job=fail))
    with pytest.raises(InputError, match="the cluster refuses the job: "):
        submit.submit(SubmitConfig("prepare"), [])
