"""A model from the registry: an output keeps the version that its alias meant at the start."""

from pathlib import Path

import pytest

from pipeline.cluster.pool import in_process
from pipeline.generation.config import GenerateConfig
from pipeline.generation.job import generate, model_to_use
from pipeline.tracking import registry, runs
from tests.generation.common import config, manifest, save
from tests.jobs.common import database


def test_an_alias_is_resolved_once_and_pinned_in_the_output(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = runs.start_run("e", "r", {})
    assert registry.log_model(run, model, "digits", "newest") == "models:/digits/1"

    def settings(name: str, count: int) -> GenerateConfig:
        return config(tmp_path / name, count=count, model="models:/digits@newest", guidance=1.0)

    def pinned(wanted: GenerateConfig) -> str:
        packed, name = registry.resolve_model(model_to_use(wanted))
        generate(wanted, packed, name, in_process)
        return name

    assert pinned(settings("first", 8)) == "models:/digits/1"
    other = save(tmp_path / "other", model_channels=64)
    assert registry.log_model(run, other, "digits", "newest") == "models:/digits/2"
    assert pinned(settings("first", 16)) == "models:/digits/1"
    assert pinned(settings("second", 8)) == "models:/digits/2"
    about = manifest(tmp_path / "first")
    assert (about["model"], about["model_asked"], about["count"]) == (
        "models:/digits/1", "models:/digits@newest", 16,
    )  # fmt: skip
