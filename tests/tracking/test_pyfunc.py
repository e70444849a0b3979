"""A served model gives the images of `sample_images`, with its own logged code and only public packages."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
import torch

from pipeline.models.sampling import sample_images
from pipeline.tracking import registry, runs
from pipeline.tracking.pyfunc import _whole_numbers
from tests.evaluation.common import small_model
from tests.jobs.common import database
from tests.system.served import free_ports
from tests.tracking.test_registry import save


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a registered model, in an MLflow database of its own."""
    home = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", database(home))
        patch.chdir(home)
        run = runs.start_run("Default", "r", {})
        yield registry.log_model(run, save(home / "model", 8), "digits")


@pytest.fixture(scope="module")
def loaded(uri: str) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(uri)


def expected(labels: list[int] | None, ids: list[int], **settings: Any) -> np.ndarray:
    model, spec = small_model(timesteps=8)
    given = torch.tensor(labels) if labels is not None else None
    usual: dict[str, Any] = {"sampler": "ddim", "sampling_steps": 8, "eta": 1.0}
    images = sample_images(model, spec, torch.tensor(ids), labels=given, **usual | settings)
    result: np.ndarray = images.permute(0, 2, 3, 1).numpy()
    return result


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"sampling_steps": 3},
        {"sampler": "ancestral", "sampling_steps": 4},
        {"sampler": "dpm_solver", "least_alpha_bar": 0.1, "sampling_steps": 4},
        {"eta": 0.0},
        {"guidance": 2.5},
        {"seed": 7},
        {"seed": -(2**63)},
    ],
)
def test_every_parameter_is_that_of_the_sampler(
    loaded: mlflow.pyfunc.PyFuncModel, params: dict[str, Any]
) -> None:
    images = loaded.predict(pd.DataFrame({"label": [3, 1], "index": [5, 2]}), params=params)
    np.testing.assert_array_equal(images, expected([3, 1], [5, 2], **params))


def test_columns_may_be_left_out(loaded: mlflow.pyfunc.PyFuncModel) -> None:
    np.testing.assert_array_equal(loaded.predict(pd.DataFrame({"label": [3, 1]})), expected([3, 1], [0, 1]))
    np.testing.assert_array_equal(loaded.predict(pd.DataFrame({"index": [4]})), expected(None, [4]))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (pd.DataFrame({"label": [3, 10]}), "column 'label' must hold whole numbers from 0 to 9"),
        (pd.DataFrame({"label": [-1]}), "column 'label' must hold"),
        (pd.DataFrame({"index": [-1]}), "column 'index' must hold"),
        (pd.DataFrame({"label": np.array([], np.int64)}), "one row for each image"),
        (pd.DataFrame(), "one row for each image|no rows|empty"),
    ],
)
def test_rows_that_ask_for_no_image_get_one_line(
    loaded: mlflow.pyfunc.PyFuncModel, rows: pd.DataFrame, reason: str
) -> None:
    with pytest.raises(Exception, match=reason) as error:
        loaded.predict(rows)
    assert len(str(error.value).splitlines()) == 1


def test_a_model_without_classes_takes_no_labels() -> None:
    with pytest.raises(ValueError, match="the model has no classes: leave column 'label' out"):
        _whole_numbers(pd.DataFrame({"label": [0]}), "label", 0)


def test_a_parameter_that_is_none_is_refused(loaded: mlflow.pyfunc.PyFuncModel) -> None:
    with pytest.raises(ValueError, match="sampler: 'euler' is not one of"):
        loaded.predict(pd.DataFrame({"label": [3]}), params={"sampler": "euler"})
    for rows in ([3, 1], "three"):
        with pytest.raises(Exception, match=r"[Ii]ncompatible|DataFrame|schema"):
            loaded.predict(rows)


@pytest.mark.slow
def test_its_requirements_are_public_and_its_code_is_with_it(uri: str, tmp_path: Path) -> None:
    """A process in another folder uses the logged code, which imports no package that only training needs."""
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(tmp_path)))
    wanted = (folder / "requirements.txt").read_text().split()
    assert {line.partition("==")[0].lower() for line in wanted} == {
        name.lower() for name in registry.SERVED_WITH
    }
    assert "ray-ddpm" not in (folder / "requirements.txt").read_text()
    program = (
        "import sys, mlflow, pandas\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "images = model.predict(pandas.DataFrame({'label': [3]}), params={'sampling_steps': 2})\n"
        "import pipeline; print(pipeline.__file__); print(images.tolist())\n"
        "print([name for name in ('ray', 'optuna', 'tyro', 'matplotlib', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, check=True,
    )  # fmt: skip
    file, images, unneeded = done.stdout.splitlines()[-3:]
    assert file.startswith(str(folder))
    assert "ray-ddpm.zip" in file
    np.testing.assert_array_equal(json.loads(images), expected([3], [0], sampling_steps=2))
    assert unneeded == "[]"


@pytest.mark.slow
def test_a_server_of_mlflow_answers_with_the_same_images(uri: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local",
         "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        stdout=log, stderr=log, start_new_session=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},  # MLflow starts uvicorn by name
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/ping", timeout=5).raise_for_status()
                break
            except requests.RequestException:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.5)
        body = {
            "dataframe_split": {"columns": ["label"], "data": [[3], [1]]},
            "params": {"sampling_steps": 2, "seed": 4},
        }
        answer = requests.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=60)
        answer.raise_for_status()
        images = answer.json()["predictions"]
        np.testing.assert_array_equal(images, expected([3, 1], [0, 1], sampling_steps=2, seed=4))
        body["dataframe_split"]["data"] = [[99]]
        refused = requests.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=60)
        assert refused.status_code == 400
        assert "from 0 to 9" in refused.text
    finally:
        with contextlib.suppress(ProcessLookupError):  # the server may have ended by itself
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()
