"""Whole runs continue while MLflow is unavailable. The missing points arrive with the next resume."""

import json
import os
import signal
from pathlib import Path

import pytest

from pipeline.errors import Interrupted
from pipeline.models.export import load_model
from pipeline.tracking import registry, runs
from pipeline.training.trainer import train
from pipeline.training.worker import Hooks
from tests.data.weather import Weather
from tests.training.digit_runs import BATCH, assert_same, curve, newest, settings
from tests.training.runs import Undisturbed
from tests.training.test_runs_in_bad_weather import Slow, at

FOREVER = 1e9


def test_a_run_ends_at_a_signal_resumes_and_finishes_while_mlflow_is_away(
    home: Path, straight: Undisturbed, mlflow: Weather, capfd: pytest.CaptureFixture[str]
) -> None:
    output = str(home / "away")
    config = settings(
        home, output, log_every=1, checkpoint_every=3, tracking_patience=1.0, register="away", resume=True
    )

    def go_away() -> None:
        mlflow.storm("503", FOREVER, lambda method, path: True)

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    storms = at(4, go_away), at(7, stop)
    with pytest.raises(Interrupted, match="is saved; go on with --resume"):
        train(
            config,
            on_point=lambda step, values: [do(step, values) for do in storms] and None,
            hooks=Hooks(watch=Slow(0.4)),
        )
    said = capfd.readouterr().err
    assert said.count("does not take") == 1
    assert "MLflow did not take everything" in said
    run_id = json.loads((home / "away" / "run.json").read_text())["run_id"]

    trained = train(config)
    said = capfd.readouterr().err
    assert "--resume delivers it" in said
    assert "Traceback" not in said
    assert (trained.run.id, trained.model) == (run_id, f"{output}/model")
    assert_same(newest(output)[0], straight.end)
    assert load_model(trained.folder)[1].provenance["steps"] == 18

    mlflow.calm()
    trained = train(config)
    assert (trained.run.id, trained.model) == (run_id, "models:/away/1")
    assert curve(trained, "loss").keys() == set(range(1, 19))  # `curve` asserts one point per step
    client = runs.open_client()
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(run_id).data.params["batch_size"] == str(BATCH)
    assert "samples.png" in {file.path for file in client.list_artifacts(run_id)}
    assert not list((home / "away" / "undelivered").glob("*"))
    assert load_model(registry.resolve_model("models:/away/1")[0])[1].provenance["steps"] == 18
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_runs([experiment], filter_string=f"tags.`ray_ddpm.output` = '{output}'")
    assert [run.info.run_id for run in found] == [run_id]
