"""The README's tour, shortened: every job on a cluster of two nodes with an S3 server and an MLflow server.

It covers what a change of the repository's layout can break: the submitted working tree, the modules that workers on
other nodes import from it, and the objects that reach them by pickle.
"""

import subprocess
from typing import Any

import mlflow
import pytest
import yaml

from tests.jobs.common import Outcome, outcome
from tests.system.conftest import Trained
from tests.system.served import BIN, BUCKET, DATA, Served

pytestmark = pytest.mark.system

SAMPLES, REPORT = (f"s3://{BUCKET}/{name}" for name in ("samples", "report"))
MODEL = "models:/digits@newest"
COUNT = 64
# SMALL, as values of a search space.
NETWORK = {
    "model.model_channels": 32, "model.channel_multipliers": [[1]], "model.res_blocks": 1,
    "model.attention_resolutions": [[4]], "readers": 1,
}  # fmt: skip


def test_the_tour(served: Served, prepared: Outcome, trained: Trained) -> None:
    assert prepared.result["count"] == 1797
    assert trained.result["model"] == "models:/digits/1"

    space = NETWORK | {"batch_size": 32, "diffusion.timesteps": [20, 30]}
    (served.home / "space.yaml").write_text(yaml.safe_dump(space))
    tuned = submitted(
        served, "tune", "--data", DATA, "--output", served.home / "search", "--space", served.home / "space.yaml",
        "--trials", 1, "--images", 320, "--rungs", 2, "--terms", 4, "--max-images", 16,
    )  # fmt: skip
    assert tuned["count"] == 1 and tuned["metrics"]["bits_per_dim"] > 0
    client = mlflow.MlflowClient(served.mlflow)
    assert client.get_model_version_by_alias("tuned", "best").version == "1"

    generated = submitted(
        served, "generate", "--model", MODEL, "--output", SAMPLES, "--count", COUNT, "--rows-per-file", 64,
        "--sampler", "ddim", "--sampling-steps", 5, "--guidance", 1.5, "--actors", 1,
    )  # fmt: skip
    assert (generated["count"], generated["model"]) == (COUNT, "models:/digits/1")

    evaluated = submitted(
        served, "evaluate", "--model", MODEL, "--data", DATA, "--samples", SAMPLES, "--output", REPORT,
        "--terms", 4, "--max-images", 16, "--max-features", 64, "--classifier-steps", 20, "--actors", 1,
    )  # fmt: skip
    assert {"bits_per_dim", "frechet_distance", "kernel_distance", "precision", "knn_label_accuracy"} <= set(
        evaluated["metrics"]
    )

    assert "report/metrics.json" in served.keys("report/")

    # The user draws pictures on their own machine, by a driver that joins the cluster.
    words = "plot", "--model", MODEL, "--data", DATA, "--output", "pictures"
    done = subprocess.run(
        [BIN / "ray-ddpm", *words],
        cwd=served.home,
        env=served.member,
        capture_output=True,
        text=True,
        timeout=240,
    )
    plotted = outcome(done)
    assert plotted.code == 0, plotted.stderr
    assert len(list((served.home / "pictures").glob("*.png"))) == plotted.result["count"] == 5
    assert not (served.home / "s3:").exists()


def submitted(served: Served, job: str, *flags: object) -> dict[str, Any]:
    """Submit a job, wait for it, and return its result."""
    done = served.submit("--wait", job, "--", *flags, timeout=500)
    assert done.code == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.result
