"""The README's tour, as short as it can be: every job, on a cluster of two nodes with an S3 server and an MLflow server.

It goes through all that a change of the layout can break: the working tree that a job is submitted with, what workers
on other nodes import of it, and what travels to them by pickle.
"""

import re
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import mlflow
import pytest
import requests
import yaml

from tests.jobs.common import outcome
from tests.system.served import BIN, BUCKET, Served, served_cluster, wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]

DATA, RUN, SAMPLES, REPORT = (f"s3://{BUCKET}/{name}" for name in ("digits", "run", "samples", "report"))
MODEL = "models:/digits@newest"
STEPS, CHECKPOINT_EVERY, COUNT = 160, 20, 64
NETWORK: dict[str, Any] = {
    "model_channels": 32, "channel_multipliers": [1], "res_blocks": 1, "attention_resolutions": [4]
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Served]:
    with served_cluster() as cluster:
        yield cluster


def test_the_tour(cluster: Served) -> None:
    prepared = submitted(cluster, "prepare", "--output", DATA, "--rows-per-shard", 900)
    assert prepared["count"] == 1797

    network = [word for name, value in NETWORK.items() for word in (flag(name), *as_words(value))]
    training = (
        "train", "--data", DATA, "--output", RUN, "--steps", STEPS, "--workers", 2, "--batch-size", 32,
        "--timesteps", 50, "--class-conditional", *network, "--checkpoint-every", CHECKPOINT_EVERY,
        "--keep-checkpoints", STEPS // CHECKPOINT_EVERY, "--log-every", 20, "--register", "digits", "--resume",
    )  # fmt: skip
    killed = cluster.start_submit("--wait", "--id", "killed", training[0], "--", *training[1:])
    wait_for("a checkpoint", lambda: has_checkpoint(cluster) or killed.poll() is not None, seconds=240)
    drivers = cluster.driver("--output", RUN)
    assert drivers and killed.poll() is None, killed.communicate()
    for process in drivers:
        process.send_signal(signal.SIGKILL)
    _, stderr = killed.communicate(timeout=240)
    assert killed.returncode not in (0, 2), stderr
    trained = submitted(cluster, *training)
    assert (trained["model"], trained["count"]) == ("models:/digits/1", STEPS)
    client = mlflow.MlflowClient(cluster.mlflow)
    (run,) = client.search_runs([client.get_run(trained["run_id"]).info.experiment_id])
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in points] == list(range(20, STEPS + 1, 20))
    assert {"data_wait_share", "undecodable_images"} <= set(trained["metrics"])
    # No step was made again that a checkpoint had: none of them is there twice.
    saved = [
        int(step) for step in re.findall(r"checkpoints/step-(\d+)-\d+/state.json", keys(cluster, "run/"))
    ]
    assert len(saved) == len(set(saved)) and max(saved) == STEPS
    assert run.info.status == "FINISHED"

    space = {
        f"model.{name}": [value] if isinstance(value, list) else value for name, value in NETWORK.items()
    }
    space |= {"batch_size": 32, "diffusion.timesteps": [20, 30]}
    (cluster.home / "space.yaml").write_text(yaml.safe_dump(space))
    tuned = submitted(
        cluster, "tune", "--data", DATA, "--output", cluster.home / "search", "--space", cluster.home / "space.yaml",
        "--trials", 2, "--images", 320, "--rungs", 2, "--terms", 4, "--max-images", 16,
    )  # fmt: skip
    assert tuned["count"] == 2 and tuned["metrics"]["bits_per_dim"] > 0
    assert client.get_model_version_by_alias("tuned", "best").version == "1"

    generated = submitted(
        cluster, "generate", "--model", MODEL, "--output", SAMPLES, "--count", COUNT, "--rows-per-file", 64,
        "--sampler", "ddim", "--sampling-steps", 5, "--guidance", 1.5, "--actors", 2,
    )  # fmt: skip
    assert (generated["count"], generated["model"]) == (COUNT, "models:/digits/1")

    evaluated = submitted(
        cluster, "evaluate", "--model", MODEL, "--data", DATA, "--samples", SAMPLES, "--output", REPORT,
        "--terms", 4, "--max-images", 16, "--max-features", 64, "--classifier-steps", 20, "--actors", 2,
    )  # fmt: skip
    assert {"bits_per_dim", "frechet_distance", "kernel_distance", "precision", "knn_label_accuracy"} <= set(
        evaluated["metrics"]
    )

    assert "report/metrics.json" in keys(cluster, "report/")

    # Pictures are drawn where the user sits: this driver joins the cluster.
    words = "plot", "--model", MODEL, "--data", DATA, "--output", "pictures"
    done = subprocess.run(
        [BIN / "ray-ddpm", *words],
        cwd=cluster.home,
        env=cluster.member,
        capture_output=True,
        text=True,
        timeout=240,
    )
    plotted = outcome(done)
    assert plotted.code == 0, plotted.stderr
    assert len(list((cluster.home / "pictures").glob("*.png"))) == plotted.result["count"] == 5
    assert not (cluster.home / "s3:").exists()


def submitted(cluster: Served, job: str, *flags: object) -> dict[str, Any]:
    """A job's result."""
    done = cluster.submit("--wait", job, "--", *flags, timeout=500)
    assert done.code == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.result


def has_checkpoint(cluster: Served) -> bool:
    return "state.json" in keys(cluster, "run/checkpoints/step-")


def keys(cluster: Served, prefix: str) -> str:
    """The bucket's listing, as the server gives it."""
    return requests.get(f"{cluster.s3}/{BUCKET}?list-type=2&prefix={prefix}", timeout=30).text


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def as_words(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
