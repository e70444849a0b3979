"""Jobs submitted from outside to a real cluster that asks for a token, with MLflow and S3 beside it."""

import json
import re
from collections.abc import Iterator
from typing import Any

import mlflow
import pytest
import requests

from tests.jobs.common import Outcome
from tests.system.served import BUCKET, Served, served_cluster, wait_for

pytestmark = pytest.mark.system

DATA = f"s3://{BUCKET}/digits"
RUN = f"s3://{BUCKET}/runs/digits"
SMALL = [
    "--model-channels",
    "32",
    "--channel-multipliers",
    "1",
    "--res-blocks",
    "1",
    "--attention-resolutions",
    "4",
]
# Enough that training still goes on when its first checkpoint has reached the storage.
STEPS, LOG_EVERY = 400, 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Served]:
    with served_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def prepared(cluster: Served) -> Outcome:
    return cluster.submit("--wait", "--id", "digits", "prepare", "--", "--output", DATA)


@pytest.fixture(scope="module")
def trained(cluster: Served, prepared: Outcome) -> dict[str, Any]:
    """The result of a training run that lost a node on its way."""
    job = cluster.start_submit(
        "--wait", "--id", "run", "train", "--", "--data", DATA, "--output", RUN, "--steps", STEPS, *SMALL,
        "--workers", 2, "--batch-size", 32, "--timesteps", 50, "--checkpoint-every", 40, "--log-every", LOG_EVERY,
        "--register", "digits", "--resume",
    )  # fmt: skip
    wait_for(
        "a checkpoint",
        lambda: bool(listed(cluster, "runs/digits/checkpoints/step-")) or job.poll() is not None,
        seconds=200,
    )
    assert job.poll() is None, job.communicate()
    lost = cluster.node_running("RayTrainWorker")
    assert lost is not None
    cluster.kill_node(lost)
    stdout, stderr = job.communicate(timeout=400)
    assert job.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


def ask(cluster: Served, path: str = "", method: str = "GET") -> Any:
    """What the job server answers, as `ray job` asks it."""
    bearer = {"Authorization": f"Bearer {cluster.token}"}
    return requests.request(method, f"{cluster.jobs}/api/jobs/{path}", headers=bearer, timeout=30).json()


def listed(cluster: Served, prefix: str) -> list[str]:
    """Keys in the bucket."""
    answer = requests.get(f"{cluster.s3}/{BUCKET}?list-type=2&prefix={prefix}", timeout=30)
    return re.findall("<Key>(.*?)</Key>", answer.text)


def test_requests_without_the_right_token_are_refused(cluster: Served) -> None:
    jobs = f"{cluster.jobs}/api/jobs/"
    assert requests.get(jobs, timeout=30).status_code == 401
    assert requests.get(jobs, headers={"Authorization": f"Bearer {'x' * 64}"}, timeout=30).status_code == 403
    for changed, complaint in (
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "x" * 64}, "refuses the token: is RAY_AUTH_TOKEN that of this cluster?"),
    ):
        refused = cluster.submit("prepare", "--", "--output", DATA, **changed)
        assert (refused.code, refused.stdout) == (2, "")
        assert refused.stderr.count("\n") == 1 and complaint in refused.stderr
    assert ask(cluster) == []


def test_the_result_comes_back_and_the_same_id_is_the_same_job(cluster: Served, prepared: Outcome) -> None:
    assert prepared.code == 0, prepared.stderr
    assert prepared.result == {"output": DATA, "count": 1797, "id": "digits", "status": "SUCCEEDED"}
    assert "digits/manifest.json" in listed(cluster, "digits/")
    again = cluster.submit("--wait", "--id", "digits", "prepare", "--", "--output", DATA)
    assert again.result == prepared.result
    other = cluster.submit("--id", "digits", "prepare", "--", "--output", f"{DATA}-2")
    assert other.code == 2 and "--id digits is another job" in other.stderr
    assert [job["submission_id"] for job in ask(cluster) if job["submission_id"]] == ["digits"]


def test_a_jobs_own_exit_code_and_last_line_come_back(cluster: Served) -> None:
    failed = cluster.submit(
        "--wait", "--id", "wrong", "train", "--", "--data", f"s3://{BUCKET}/nowhere", "--output", RUN
    )
    assert (failed.code, failed.stdout) == (2, "")
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("submit: job wrong failed: train: ") and "nowhere" in last
    assert ask(cluster, "wrong")["status"] == "FAILED"


def test_training_outlives_a_node_with_one_run_and_one_curve(
    cluster: Served, trained: dict[str, Any]
) -> None:
    assert trained["status"] == "SUCCEEDED" and trained["model"] == "models:/digits/1"
    client = mlflow.MlflowClient(cluster.mlflow)
    runs = client.search_runs([client.get_run(trained["run_id"]).info.experiment_id])
    mine = [run for run in runs if run.data.params.get("output") == RUN]
    assert [run.info.run_id for run in mine] == [trained["run_id"]]
    points = client.get_metric_history(trained["run_id"], "loss")
    assert [point.step for point in points] == list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))
    assert str(client.get_model_version_by_alias("digits", "newest").version) == "1"


def test_a_job_is_stopped(cluster: Served, prepared: Outcome) -> None:
    started = cluster.submit(
        "--id",
        "long",
        "train",
        "--",
        "--data",
        DATA,
        "--output",
        cluster.home / "long",
        "--steps",
        10**6,
        *SMALL,
    )
    assert started.code == 0 and started.result["id"] == "long"
    wait_for("its start", lambda: ask(cluster, "long")["status"] == "RUNNING")
    assert ask(cluster, "long/stop", "POST")["stopped"]
    wait_for("its end", lambda: ask(cluster, "long")["status"] == "STOPPED")
    joined = cluster.submit(
        "--wait", "--id", "long", "train", "--", "--data", DATA, "--output", cluster.home / "long",
        "--steps", 10**6, *SMALL,
    )  # fmt: skip
    assert joined.code not in (0, 2) and "long stopped" in joined.stderr


def test_the_clusters_secrets_are_nowhere(cluster: Served, trained: dict[str, Any]) -> None:
    """The S3 password and the token were in every node's environment, and in nothing that anyone can ask for."""
    bearer = {"Authorization": f"Bearer {cluster.token}"}
    shown = {
        path: requests.get(f"{cluster.jobs}/api/{path}", headers=bearer, timeout=30).text
        for path in ("jobs/", "v0/actors?detail=1")
    }
    for job in (job["submission_id"] for job in ask(cluster) if job["submission_id"]):
        shown[f"logs of {job}"] = ask(cluster, f"{job}/logs")["logs"]
    for path in (cluster.home / "mlflow.db", *(cluster.home / "artifacts").rglob("*")):
        if path.is_file():
            shown[str(path)] = path.read_bytes().decode(errors="replace")
    assert "digits" in shown["logs of run"] and "runs/digits" in shown[str(cluster.home / "mlflow.db")]
    for place, text in shown.items():
        for secret in (cluster.secret, cluster.token):
            before, found, _ = text.partition(secret)
            assert not found, f"{place}: {before[-500:]}"
