"""MLflow runs under concurrent writers and lost answers."""

import getpass
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import storage
from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec, TrainConfig
from pipeline.errors import InputError
from pipeline.tracking import runs
from pipeline.training import identity
from tests.data.weather import LOST, Weather
from tests.jobs.common import database

PARTS = (ModelConfig(), ImageConfig(8, 1), DiffusionConfig())


def test_runs_that_start_together_share_experiment_and_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database(tmp_path))
    runs.start_run("other", "", {})  # creates the tables
    real, asked = MlflowClient.get_experiment_by_name, []

    def too_early(client: MlflowClient, name: str) -> object:
        """Answer the first lookups as if the experiment didn't exist, so that every run tries to create it."""
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


def test_data_are_named_by_what_is_the_same_for_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stored value of a run, nor the model's card, holds a path of the machine that holds the data."""
    (tmp_path / "server").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database(tmp_path / "server"))
    home = tmp_path / "alice"
    (home / "digits").mkdir(parents=True)
    monkeypatch.chdir(home / "digits")
    for uri, title, name in (
        (str(home / "digits"), "digits", "digits"),
        ("../digits/", "digits", "digits"),
        (".", "digits", "digits"),
        (f"file://{home}/digits", "digits", "digits"),
        (f"{home}/digits/train*.parquet", "digits/train*.parquet", "train*.parquet"),
        ("s3://bucket/digits", "s3://bucket/digits", "digits"),
    ):
        config = TrainConfig(uri, "out")
        settings = identity.logged_settings(config)
        assert settings["data"] == title
        assert identity.logged_config(config).get("data") == (uri if uri == title else None)
        run = runs.open_run("e", identity.run_name(config, ModelSpec(*PARTS)), runs.origin("train"), 10)
        runs.log_params(run, settings)
        runs.log_config(run, identity.logged_config(config))
        runs.log_dataset(run, storage.absolute(uri), "f" * 64, 10)
        stored = MlflowClient().get_run(run.id)
        assert stored.info.run_name == f"{name} cosine T=1000"
        assert stored.data.tags["mlflow.source.name"] == "ray-ddpm train"
        assert stored.info.user_id == stored.data.tags["mlflow.user"] == getpass.getuser()
        (dataset,) = (one.dataset for one in stored.inputs.dataset_inputs)
        assert (dataset.name, dataset.digest) == (name, "f" * 32)
    kept = b"".join(path.read_bytes() for path in home.parent.rglob("*") if path.is_file())
    assert b"digits" in kept
    # MLflow's own artifact locations point into the working directory.
    assert str(home).encode() not in kept.replace(str(home / "digits" / "mlruns").encode(), b"")


def test_an_opening_whose_answers_get_lost_leaves_one_run(mlflow: Weather) -> None:
    mlflow.storm(LOST, 1.5, lambda method, path: "runs/create" in path)
    run = runs.open_run("Default", "", {"asked": "once"}, seconds=30)
    assert mlflow.seen > 1
    client = runs.open_client()
    found = client.search_runs(["0"], "tags.asked = 'once'")
    assert [each.info.run_id for each in found] == [run.id]


def test_a_database_whose_driver_is_not_installed_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent() -> None:
        raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:secret@127.0.0.1:9/x")
    monkeypatch.setattr(runs.mlflow, "set_tracking_uri", lambda uri: None)
    monkeypatch.setattr(runs.mlflow, "MlflowClient", absent)
    with pytest.raises(InputError, match="needs a package that is not installed: psycopg") as told:
        runs.open_client()
    assert "secret" not in str(told.value)
