"""The main job as a user runs it: from digits to a registered model, a dataset of samples and pictures."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline.models.export import load_model
from tests.jobs.common import Outcome, run_job

STEPS, COUNT = 30, 24
pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main-job")


@pytest.fixture(scope="module")
def demo(home: Path) -> Outcome:
    uri = f"sqlite:///{home / 'demo.db'}"  # doesn't exist yet, as for a new user
    outcome = run_job(
        "demo", "--output", home / "demo", "--steps", STEPS, "--count", COUNT, "--workers", 1, home=home,
        timeout=500, MLFLOW_TRACKING_URI=uri,
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    return outcome


@pytest.fixture
def client(demo: Outcome, home: Path) -> Iterator[mlflow.MlflowClient]:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{home / 'demo.db'}")
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


def test_stdout_is_one_json_line_and_stderr_says_where_everything_is(demo: Outcome, home: Path) -> None:
    (line,) = demo.stdout.splitlines()
    assert {"output", "model", "run_id", "metrics", "count"} <= set(json.loads(line))
    assert demo.result["count"] == COUNT
    for shown in ("pictures", "dataset", "model", "mlflow ui --backend-store-uri"):
        assert shown in demo.stderr
    assert "Traceback" not in demo.stderr and "Warning" not in demo.stderr


def test_the_run_holds_params_metrics_config_dataset_and_a_grid(
    demo: Outcome, client: mlflow.MlflowClient
) -> None:
    run = client.get_run(demo.result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["steps"] == str(STEPS)
    assert run.data.params["diffusion.schedule"] == "cosine"
    assert {"loss", "images_per_second", "data_wait_share", "gradient_norm"} <= set(run.data.metrics)
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    assert run.inputs.dataset_inputs[0].dataset.digest
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "samples.png"} <= names


def test_the_registered_alias_names_the_model_in_the_folder(
    demo: Outcome, client: mlflow.MlflowClient, home: Path
) -> None:
    version = client.get_model_version_by_alias("digits", "newest")
    assert demo.result["model"] == f"models:/digits/{version.version}"
    model, spec = load_model(home / "demo" / "run" / "model")
    assert spec.image.size == 8 and len(spec.image.classes) == 10
    assert (home / "demo" / "run" / "model" / "README.md").exists()
    loaded = mlflow.pyfunc.load_model("models:/digits@newest")
    images = loaded.predict(pd.DataFrame({"label": [3, 1]}), params={"sampling_steps": 2})
    assert np.asarray(images).shape == (2, 8, 8, 1) and np.asarray(images).dtype == np.uint8
    assert sum(p.numel() for p in model.parameters()) > 0


def test_the_samples_open_with_datasets(demo: Outcome, home: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        str(home / "demo" / "samples"), split="train", cache_dir=str(home / "cache")
    )
    assert len(loaded) == COUNT
    assert loaded[0]["image"].size == (8, 8)
    assert loaded["index"][:] == list(range(COUNT))


def test_the_pictures_are_there_and_not_blank(demo: Outcome, home: Path) -> None:
    for name in ("samples", "process", "schedules", "nearest"):
        pixels = np.asarray(Image.open(home / "demo" / "pictures" / f"{name}.png").convert("L"))
        assert pixels.std() > 5, name
