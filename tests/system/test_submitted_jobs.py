"""Jobs submitted from outside to a real cluster that asks for a token, with MLflow and S3 beside it."""

import subprocess
import sys
from typing import Any

import mlflow
import pytest
import requests

from tests.jobs.common import ROOT, Outcome
from tests.system.conftest import STEPS, Trained
from tests.system.served import BUCKET, DATA, PREPARE, RUN, SMALL, Served, wait_for

pytestmark = pytest.mark.system


def ask(served: Served, path: str = "", method: str = "GET") -> Any:
    """Return the job server's answer to a request as `ray job` sends it."""
    bearer = {"Authorization": f"Bearer {served.token}"}
    return requests.request(method, f"{served.jobs}/api/jobs/{path}", headers=bearer, timeout=30).json()


def submitted(served: Served) -> list[str]:
    """Return the ids of all submitted jobs."""
    return sorted(job["submission_id"] for job in ask(served) if job["submission_id"])


def test_requests_without_the_right_token_are_refused(served: Served) -> None:
    jobs, before = f"{served.jobs}/api/jobs/", submitted(served)
    assert requests.get(jobs, timeout=30).status_code == 401
    assert requests.get(jobs, headers={"Authorization": f"Bearer {'x' * 64}"}, timeout=30).status_code == 403
    for changed, complaint in (
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "x" * 64}, "refuses the token: is RAY_AUTH_TOKEN that of this cluster?"),
    ):
        refused = served.submit("prepare", "--", "--source", "digits", "--output", DATA, **changed)
        assert (refused.code, refused.stdout) == (2, "")
        assert refused.stderr.count("\n") == 1 and complaint in refused.stderr
    assert submitted(served) == before


def test_the_result_comes_back_and_the_same_id_is_the_same_job(served: Served, prepared: Outcome) -> None:
    assert prepared.code == 0, prepared.stderr
    assert prepared.result == {"output": DATA, "count": 1797, "id": "digits", "status": "SUCCEEDED"}
    assert "digits/manifest.json" in served.keys("digits/")
    before = submitted(served)
    again = served.submit("--wait", "--id", "digits", *PREPARE)
    assert again.result == prepared.result
    other = served.submit("--id", "digits", "prepare", "--", "--output", f"{DATA}-2")
    assert other.code == 2 and "--id digits is another job" in other.stderr
    assert submitted(served) == before


def test_a_jobs_own_exit_code_and_last_line_come_back(served: Served) -> None:
    failed = served.submit(
        "--wait", "--id", "wrong", "train", "--", "--data", f"s3://{BUCKET}/nowhere", "--output", RUN
    )
    assert (failed.code, failed.stdout) == (2, "")
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("submit: job wrong failed: train: ") and "nowhere" in last
    assert ask(served, "wrong")["status"] == "FAILED"


def test_what_is_no_text_is_followed_to_its_end(served: Served) -> None:
    """Ray's own stream of such a job's output ends early without an error."""
    (served.home / "bytes.py").write_text(
        "import os, time\n"
        r"os.write(1, b'\xff\xfe 1\r2\n')"
        '\ntime.sleep(2)\nprint(\'{"output": "/x"}\')\n'
    )
    follow = (
        "import sys; from pipeline.cluster import job_server, submit; client = job_server.connect(sys.argv[1]);"
        "print(submit._follow(client, client.submit_job(entrypoint=sys.argv[2], submission_id='bytes')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", follow, served.jobs, f"python {served.home}/bytes.py"],
        env=served.user, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "{'output': '/x', 'id': 'bytes', 'status': 'SUCCEEDED'}\n", done.stderr
    # Ray writes a line of its own into the job's output, and may be late with it.
    lines = [line for line in done.stderr.splitlines() if "Running entrypoint" not in line]
    assert lines[-3:] == ["\ufffd\ufffd 1", "2", '{"output": "/x"}']


def test_training_goes_on_after_its_driver_in_one_run_with_one_curve(
    served: Served, trained: Trained
) -> None:
    result = trained.result
    assert (result["status"], result["model"], result["count"]) == ("SUCCEEDED", "models:/digits/1", STEPS)
    assert {"data_wait_share", "undecodable_images"} <= set(result["metrics"])
    client = mlflow.MlflowClient(served.mlflow)
    runs = client.search_runs([client.get_run(result["run_id"]).info.experiment_id])
    (mine,) = [run for run in runs if run.data.params.get("output") == RUN]
    assert (mine.info.run_id, mine.info.status) == (result["run_id"], "FINISHED")
    points = client.get_metric_history(result["run_id"], "loss")
    assert [point.step for point in points] == list(range(20, STEPS + 1, 20))
    assert str(client.get_model_version_by_alias("digits", "newest").version) == "1"
    # No step was repeated that had a checkpoint when the driver died.
    made = sorted(trained.after)[len(trained.before) :]
    assert sorted(trained.after) == sorted(trained.before + made)
    assert len(made) == len(set(made)) and max(trained.before) < made[0] and made[-1] == STEPS


def test_a_job_is_stopped(served: Served, prepared: Outcome) -> None:
    started = served.submit(
        "--id",
        "long",
        "train",
        "--",
        "--data",
        DATA,
        "--output",
        served.home / "long",
        "--steps",
        10**6,
        *SMALL,
    )
    assert started.code == 0 and started.result["id"] == "long"
    wait_for("its start", lambda: ask(served, "long")["status"] == "RUNNING")
    assert ask(served, "long/stop", "POST")["stopped"]
    wait_for("its end", lambda: ask(served, "long")["status"] == "STOPPED")
    joined = served.submit(
        "--wait", "--id", "long", "train", "--", "--data", DATA, "--output", served.home / "long",
        "--steps", 10**6, *SMALL,
    )  # fmt: skip
    assert joined.code not in (0, 2) and "long stopped" in joined.stderr


def test_the_clusters_secrets_are_nowhere(served: Served, trained: Trained) -> None:
    """The S3 password and the token are in every node's environment, but in no answer, log or file."""
    bearer = {"Authorization": f"Bearer {served.token}"}
    shown = {
        path: requests.get(f"{served.jobs}/api/{path}", headers=bearer, timeout=30).text
        for path in ("jobs/", "v0/actors?detail=1", *(f"jobs/{job}/logs" for job in submitted(served)))
    }
    for path in (served.home / "mlflow.db", *(served.home / "artifacts").rglob("*")):
        if path.is_file():
            shown[str(path)] = path.read_bytes().decode(errors="replace")
    assert "digits" in shown["jobs/run/logs"] and "runs/digits" in shown[str(served.home / "mlflow.db")]
    for place, text in shown.items():
        for secret in (served.secret, served.token):
            before, found, _ = text.partition(secret)
            assert not found, f"{place}: {before[-500:]}"
