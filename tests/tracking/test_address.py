"""MLflow's address means the same file from any working directory."""

from pathlib import Path

import pytest

from pipeline.tracking import address


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{here}/mlflow.db"),
        ("sqlite:///a/b.db?timeout=9", "sqlite:///{here}/a/b.db?timeout=9"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("mlruns", "{here}/mlruns"),
        ("file:./mlruns", "file:{here}/mlruns"),
        ("file:///a/mlruns", "file:///a/mlruns"),
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("postgresql://me:secret@db/mlflow", "postgresql://me:secret@db/mlflow"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
    ],
)
def test_a_relative_path_is_one_of_the_driver(
    given: str, means: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert address.tracking_uri() == means.format(here=tmp_path)
    if "secret" not in given:
        assert address.environment() == {"MLFLOW_TRACKING_URI": means.format(here=tmp_path)}
