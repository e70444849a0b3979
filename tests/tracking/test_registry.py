"""A MODEL name leads to exactly the logged model, and no temporary copy is left."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.pool import in_process
from pipeline.commands import evaluate, generate, plot, train
from pipeline.config import DiffusionConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipeline.errors import InputError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.generation.config import GenerateConfig
from pipeline.models.export import load_model, model_fingerprint, save_model
from pipeline.tracking import registry, runs
from tests.evaluation.common import small_model
from tests.jobs.common import database


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for this process's temporary files. MLflow gets a database of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def save(place: Any, timesteps: int) -> Any:
    model, spec = small_model(timesteps=timesteps)
    return save_model(place, model.state_dict(), spec)


def test_a_model_is_logged_from_any_storage_and_comes_back_by_all_its_names(temporary: Path) -> None:
    run = runs.start_run("e", "r", {})
    far = save(f"memory://{temporary}/model", 5)
    assert registry.log_model(run, far, "digits", "newest") == "models:/digits/1"
    near = save(temporary.parent / "model", 7)
    assert registry.log_model(run, near, "digits", "newest") == "models:/digits/2"
    assert registry.log_model(run, near).startswith("models:/m-")
    # A resume of the older run, which has nothing left to do, does not take the alias back.
    assert registry.log_model(run, far, "digits", "newest") == "models:/digits/1"
    for name, pinned, folder in (
        ("models:/digits/1", "models:/digits/1", far),
        ("models:/digits@newest", "models:/digits/2", near),
        ("models:/digits/latest", "models:/digits/2", near),
        (far, far, far),
        (str(near), str(near), near),
    ):
        packed, found = registry.resolve_model(name)
        assert found == pinned
        assert model_fingerprint(packed) == model_fingerprint(folder)
        assert load_model(packed)[1] == load_model(folder)[1]
    assert not list(temporary.iterdir())


def test_of_a_logged_folder_with_more_models_in_it_exactly_its_own_is_taken(temporary: Path) -> None:
    """A sorted search through the folder would find the model in `averages` first."""
    run = runs.start_run("e", "r", {})
    folder = save(temporary.parent / "model", 5)
    save(folder / "averages" / "one", 7)
    save(folder / "zoo", 9)
    name = registry.log_model(run, folder, "digits")
    assert load_model(registry.resolve_model(name)[0])[1].diffusion.timesteps == 5


def test_a_version_says_what_it_is_and_keeps_what_somebody_has_written(temporary: Path) -> None:
    run, home = runs.start_run("e", "r", {}), temporary.parent
    model, spec = small_model(timesteps=5)
    facts = {"data": "digits", "data_fingerprint": "f" * 64, "steps": 9, "batch_size": 8}
    folder = save_model(home / "model", model.state_dict(), dataclasses.replace(spec, provenance=facts))
    (home / "samples.png").write_bytes(b"a picture")
    runs.log_file(run, home / "samples.png")
    # Figures of an earlier step don't belong to the model.
    points = [(step, {"bits_per_dim": 4.0 - step / 10, "bits_per_dim_stderr": 0.5}) for step in (6, 9)]
    runs.log_points(run, [(1000 * step, step, values) for step, values in points])
    assert registry.log_model(run, folder, "digits", "newest") == "models:/digits/1"
    client = runs.open_client()
    version = client.get_model_version("digits", "1")
    assert version.tags == {
        "schedule": "cosine", "timesteps": "5", "image": "8x8x1", "data": "digits", "data_fingerprint": "f" * 64,
        "steps": "9", "bits_per_dim": "3.1", "bits_per_dim_stderr": "0.5",
    }  # fmt: skip
    assert version.description.startswith(f"![Samples](get-artifact?path=samples.png&run_uuid={run.id})\n\n")
    assert "8x8 images of 1 channel(s), cosine schedule, T = 5" in version.description
    assert "Trained on digits (fingerprint ffffffffffffffff): 9 steps of 8 images." in version.description
    client.update_model_version("digits", "1", "the one for the paper")
    client.set_model_version_tag("digits", "1", "data", "ours")
    registry.log_model(run, folder, "digits", "newest")
    version = client.get_model_version("digits", "1")
    assert (version.description, version.tags["data"]) == ("the one for the paper", "ours")


def test_a_version_without_figures_or_a_picture_claims_none(temporary: Path) -> None:
    run, folder = runs.start_run("e", "r", {}), temporary.parent / "model"
    model, spec = small_model()
    many = dataclasses.replace(spec.image, classes=tuple(f"{number} {'name' * 20}" for number in range(500)))
    spec = dataclasses.replace(spec, image=many, provenance={"steps": 9})
    save_model(folder, model.state_dict(), spec)
    runs.log_points(run, [(1, 6, {"bits_per_dim": 4.0})])
    registry.log_model(run, folder, "digits")
    version = runs.open_client().get_model_version("digits", "1")
    assert version.tags.keys() == {"schedule", "timesteps", "image", "steps"}
    assert version.description.startswith("An epsilon-predicting UNet")
    assert len(version.description) == registry.MOST_WORDS


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", r"--model nowhere: no such folder; give an exported model folder, models:/NAME/VERSION or"),
        ("memory://nowhere/at-all", "no such folder"),
        (".", r"--model \. is not an exported model: no model\.safetensors in it"),
        ("models:/nobody", r"which version\? Give models:/nobody@newest"),
        ("models:/nobody/1", r"MLflow at \S+ .*not found"),
        ("models:/nobody/latest", r"MLflow at \S+ "),
        ("models:/nobody@newest", r"MLflow at \S+ .*not found"),
    ],
)  # fmt: skip
def test_a_name_that_leads_nowhere_gets_one_line_and_leaves_nothing(
    name: str, says: str, temporary: Path
) -> None:
    with pytest.raises(InputError, match=says) as error:
        registry.resolve_model(name)
    assert "\n" not in str(error.value)
    assert not list(temporary.iterdir())


def test_no_job_leaves_anything_in_the_temporary_folder(
    cluster: None, digits: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actors' work runs in this process, so that its temporary files are seen."""
    for place in ("generation.job", "evaluation.evaluate"):
        monkeypatch.setattr(f"pipeline.{place}.ActorPool", lambda *_, **__: in_process)

    def leaves_nothing(job: Any, config: Any) -> dict[str, Any]:
        try:
            checked = [job.check(config)] if hasattr(job, "check") else []
            result: dict[str, Any] = job.execute(config, *checked)
        finally:
            assert not list(temporary.iterdir())
        return result

    data, home = str(digits), temporary.parent
    trained = leaves_nothing(
        train,
        TrainConfig(
            data, str(home / "run"), steps=1, batch_size=8, register="digits",
            model=ModelConfig(32, (1,), res_blocks=1, attention_resolutions=()),
            diffusion=DiffusionConfig(timesteps=8),
            optimizer=OptimizerConfig(warmup_steps=1),
        ),
    )  # fmt: skip
    model, out = trained["model"], str(home / "out")
    assert model == "models:/digits/1"
    made = GenerateConfig(
        model, out, count=2, batch_size=2, rows_per_file=2, sampling_steps=2, actors=1, max_blank_fraction=1.0
    )
    assert leaves_nothing(generate, made)["count"] == 2
    bits = EvaluateConfig(
        model, data, output=str(home / "figures"), metrics=("bits",), max_images=2, actors=1
    )
    measured = leaves_nothing(evaluate, bits)["metrics"]
    assert measured["bits_per_dim"] > 0
    client, version = runs.open_client(), runs.open_client().get_model_version("digits", "1")
    logged = client.get_run(version.run_id).data.metrics
    assert {name: logged[f"evaluate/{name}"] for name in measured} == pytest.approx(measured, rel=1e-6)
    assert float(version.tags["bits_per_dim"]) == pytest.approx(measured["bits_per_dim"], rel=1e-5)
    assert [file.path for file in client.list_artifacts(version.run_id, "evaluate")] == ["evaluate/terms.png"]
    assert leaves_nothing(plot, plot.PlotConfig(model, data, str(home / "pictures")))["count"] == 5
    drawn = [file.path for file in client.list_artifacts(version.run_id, "plot")]
    assert drawn == [f"plot/{name}.png" for name in ("bound", "nearest", "process", "samples", "schedules")]
    for job, config in (
        (generate, GenerateConfig(model, out, count=0)),
        (evaluate, EvaluateConfig(model, "nowhere")),
        (plot, plot.PlotConfig(model, "nowhere", str(home / "more"))),
    ):
        with pytest.raises(InputError):
            leaves_nothing(job, config)


def test_figures_of_a_model_stay_with_who_measured_it_where_mlflow_does_not_take_them(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.log_results("runs/model", "evaluate", {"bits_per_dim": 1.0}, [])
    assert not capsys.readouterr().err
    registry.log_results("models:/nobody/3", "evaluate", {"bits_per_dim": 1.0}, [])
    assert "the results are not in MLflow" in capsys.readouterr().err
    monkeypatch.setattr(registry, "PATIENCE", 0.5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    registry.log_results("models:/digits/1", "evaluate", {"bits_per_dim": 1.0}, [])
    assert "the results are not in MLflow: MLflow at http://127.0.0.1:9" in capsys.readouterr().err


def test_results_of_a_model_in_a_trainings_output_go_to_the_run_of_that_training(
    temporary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.start_run("results", "mine", {})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"run_id": run.id}))
    picture = tmp_path / "terms.png"
    picture.write_bytes(b"png")
    registry.log_results(f"{tmp_path}/run/model", "evaluate", {"bits_per_dim": 1.5}, [str(picture)])
    client = runs.open_client()
    assert client.get_run(run.id).data.metrics["evaluate/bits_per_dim"] == 1.5
    assert [file.path for file in client.list_artifacts(run.id, "evaluate")] == ["evaluate/terms.png"]
    assert f"/#/runs/{run.id}" in capsys.readouterr().err
    registry.log_results(f"{tmp_path}/run/ema-0.1", "evaluate", {"bits_per_dim": 9.0}, [])
    assert client.get_run(run.id).data.metrics["evaluate/bits_per_dim"] == 1.5


def test_results_of_a_folder_make_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "run.json").write_text('{"run_id": "r"}')
    registry.log_results("model", "evaluate", {"bits_per_dim": 1.5}, [])
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_what_somebody_has_deleted_is_logged_and_registered_again(temporary: Path) -> None:
    run, client = runs.start_run("e", "r", {}), runs.open_client()
    folder = save(temporary.parent / "model", 5)
    assert registry.log_model(run, folder, "digits", "newest") == "models:/digits/1"
    client.delete_model_version("digits", "1")
    assert registry.log_model(run, folder, "digits", "newest") == "models:/digits/2"
    # The name begins anew at version 1, which is another run's.
    client.delete_registered_model("digits")
    other = runs.start_run("e", "other", {})
    assert registry.log_model(other, save(temporary.parent / "other", 7), "digits") == "models:/digits/1"
    assert registry.log_model(run, folder, "digits", "newest") == "models:/digits/2"
    assert client.get_model_version_by_alias("digits", "newest").run_id == run.id
    logged = registry.log_model(run, folder)
    client.delete_logged_model(logged.removeprefix("models:/"))
    assert registry.log_model(run, folder) != logged
