"""MLflow under many writers."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.tracking import runs
from tests.data.weather import LOST, Weather
from tests.jobs.common import database


def test_runs_that_start_together_share_experiment_and_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database(tmp_path))
    runs.start_run("other", "", {})  # makes the tables
    real, asked = MlflowClient.get_experiment_by_name, []

    def too_early(client: MlflowClient, name: str) -> object:
        """Each run looks once before any of them has made the experiment."""
        asked.append(name)
        return None if len(asked) <= 4 else real(client, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", too_early)

    def start(name: str) -> str:
        run = runs.start_run("new", name, {})
        runs.log_dataset(run, "s3://bucket/digits", "f" * 32, 10)
        return run.id

    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(start, "abcd"))
    client = MlflowClient()
    stored = [client.get_run(run) for run in ids]
    assert len({run.info.experiment_id for run in stored}) == 1
    assert all(run.inputs.dataset_inputs[0].dataset.name == "digits" for run in stored)


def test_an_opening_whose_answers_get_lost_leaves_one_run(mlflow: Weather) -> None:
    mlflow.storm(LOST, 1.5, lambda method, path: "runs/create" in path)
    run = runs.open_run("Default", "", {"asked": "once"}, seconds=30)
    assert mlflow.seen > 1
    client = runs.open_client()
    found = client.search_runs(["0"], "tags.asked = 'once'")
    assert [each.info.run_id for each in found] == [run.id]
