"""Input from outside runs no code, and secrets appear in no output, log or file."""

import dataclasses
import io
import pickle
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from packaging.utils import canonicalize_name
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

from pipeline.commands import cli
from pipeline.commands.__main__ import main
from pipeline.config import TrainConfig
from pipeline.data import groups
from pipeline.data.sources import registry as sources
from pipeline.data.sources.parts import Request
from pipeline.errors import InputError
from pipeline.evaluation.inception import read_torchscript
from pipeline.models.export import load_model
from pipeline.redact import redact, refuse_secrets
from pipeline.tracking import address, registry, runs
from pipeline.training import checkpoint
from pipeline.training.state import new_state
from tests.jobs.common import ROOT, database
from tests.training.common import problem

SECRET = "planted/wJalrXUtnFEMI+K7MDENG"


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The path where a planted pickle would create a file. A first pickle shows that it really does."""
    trial = tmp_path / "trial"
    pickle.loads(pickle.dumps(Planted(trial)))
    assert trial.exists()
    return tmp_path / "mark"


def test_a_pickle_in_a_model_folder_is_not_run(tmp_path: Path, mark: Path) -> None:
    torch.save(Planted(mark), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"damaged model|missing"):
        load_model(tmp_path)
    assert not mark.exists()


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path, mark: Path) -> None:
    checkpoint.write(str(tmp_path), checkpoint.capture(new_state(*problem(), torch.device("cpu"))), {})
    planted = tmp_path / "optimizer.safetensors"
    torch.save(Planted(mark), planted)
    # An attacker who can plant a file can also record its digest.
    state = checkpoint.json.loads((tmp_path / "state.json").read_text())["state"]
    state["sha256"][planted.name] = checkpoint._digest(planted.read_bytes())
    content = {"sha256": checkpoint._digest(checkpoint._canonical(state)), "state": state}
    (tmp_path / "state.json").write_text(checkpoint.json.dumps(content))
    with pytest.raises(checkpoint.DamagedCheckpoint, match="deserializing"):
        checkpoint.read(str(tmp_path))
    assert not mark.exists()


def test_a_pickle_in_place_of_a_torchscript_file_is_not_run(tmp_path: Path, mark: Path) -> None:
    for name, planted in (("a.pt", pickle.dumps(Planted(mark))), ("b.pt", _torch_file(mark))):
        (tmp_path / name).write_bytes(planted)
        with pytest.raises(InputError, match="not a TorchScript file"):
            read_torchscript(str(tmp_path / name))
    assert not mark.exists()


def _torch_file(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Planted(mark), buffer)
    return buffer.getvalue()


def test_a_pickle_in_the_registry_is_not_run(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database(tmp_path))
    run = runs.start_run("e", "", {})
    folder = tmp_path / "logged"
    folder.mkdir()
    (folder / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n    python_model: python_model.pkl\n"
    )
    (folder / "python_model.pkl").write_bytes(pickle.dumps(Planted(mark)))
    client = mlflow.MlflowClient()
    client.log_artifacts(run.id, str(folder), "model")
    client.create_registered_model("planted")
    client.create_model_version("planted", f"runs:/{run.id}/model", run.id)
    with pytest.raises(InputError, match="was not written by ray-ddpm"):
        registry.resolve_model("models:/planted/1")
    assert not mark.exists()


@pytest.mark.parametrize("column", ["image", "label", "path"])
def test_a_pickle_in_a_parquet_file_is_not_run(tmp_path: Path, mark: Path, column: str) -> None:
    planted = ArrowPythonObjectArray.from_objects([Planted(mark)])
    path = planted if column == "path" else pa.array(["a.png"])
    image = pa.StructArray.from_arrays([pa.array([b"x"]), path], ["bytes", "path"])
    columns = {"image": image, "label": pa.array([1])} | ({column: planted} if column != "path" else {})
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), file)
    # Plain pyarrow runs the pickle, so the danger is real.
    pq.read_table(file).to_pylist()
    assert mark.exists()
    mark.unlink()
    with pytest.raises(InputError, match="not plain data"):
        list(sources.open_source("huggingface", str(tmp_path), Request(10)).listing.parts[0].read())
    with pytest.raises(InputError, match="not plain data"):
        groups.read_rows(groups.row_group(str(file), 0, 1), np.array([0]))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"s3://AKIA:{SECRET}@bucket/a", "s3://***@bucket/a"),
        ("postgresql://mlflow:pa@ss@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("https://hf_token123@host/x", "https://***@host/x"),
        ("https://host/a?sv=1&sig=abc%2F", "https://host/a?sv=1&sig=***"),
        ("http://host/a?X-Amz-Signature=abc&x=1", "http://host/a?X-Amz-Signature=***&x=1"),
        (f"no such user {SECRET}!", "no such user ***!"),
        ("redis://:0nly-a-password@redis:6379/0", "redis://***@redis:6379/0"),
        (f"AccountName=a;AccountKey={'aB3+' * 21}aA==;E=x", "AccountName=a;AccountKey=***;E=x"),
        (f"401 for AI{'za'}{'Sy_-b' * 7}", "401 for ***"),
        (f"bad token hf{'_'}{'abcdeFGHIJ' * 3}abcd.", "bad token ***."),
        ("the site says w4ndb-planted", "the site says ***"),
    ],
)
def test_secrets_are_masked(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", "w4ndb-planted")
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a/b", "http://host:5000/a@b", "models:/digits@newest", "hf://datasets/a/b@main/x.parquet",
        "abfs://container@account.dfs.core.windows.net/x", "/home/me/a:b@c", "sqlite:////tmp/mlflow.db",
        "see http://host:8265 (10:30)", "http://host/a?design=3",
    ],
)  # fmt: skip
def test_what_is_no_secret_is_shown_as_it_is(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/tmp/mlflow.db")
    monkeypatch.setenv("SSH_PUBLIC_KEY", "sqlite:////tmp")
    monkeypatch.setenv("SORT_KEY", "datasets")
    assert redact(text) == text


def test_a_secret_in_any_flag_is_refused_and_not_repeated() -> None:
    config = TrainConfig(data="d", output="o")
    refuse_secrets(config)
    for field in dataclasses.fields(TrainConfig):
        if isinstance(getattr(config, field.name), str):
            bad = dataclasses.replace(config, **{field.name: f"s3://me:{SECRET}@bucket"})
            with pytest.raises(
                InputError, match=f"--{field.name.replace('_', '-')} .*holds a secret"
            ) as caught:
                refuse_secrets(bad)
            assert SECRET not in str(caught.value)


def test_a_planted_secret_reaches_no_output_of_a_job(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", f"s3://me:{SECRET}@bucket/a", "--output", "run"]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "--data s3://***@bucket/a holds a secret" in err
    assert SECRET not in err


def test_an_mlflow_that_does_not_answer_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("pipeline.tracking.registry.PATIENCE", 0.0)

    def start() -> runs.Run:
        return runs.wait_for_mlflow(lambda: runs.start_run("e", "", {}), 0.0)

    for ask in (lambda: registry.resolve_model("models:/a/1"), start):
        with pytest.raises(InputError, match=r"MLflow at http://\*\*\*@127") as caught:
            ask()
        assert SECRET not in str(caught.value)


def test_an_unforeseen_error_shows_its_traceback_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)

    def run(config: TrainConfig) -> dict[str, Any]:
        raise KeyError(f"signed with {SECRET}")

    code = cli.main("train", "", TrainConfig, run, ["--data", "d", "--output", "o"], ray=False)
    shown = capfd.readouterr()
    assert code == 1
    assert "Traceback" in shown.err and "signed with ***" in shown.err
    assert SECRET not in shown.err + shown.out


def test_mlflow_is_told_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.chdir(tmp_path)  # MLflow writes artifacts to ./mlruns
    uri = f"s3://me:{SECRET}@bucket/digits"
    run = runs.start_run("e", "n", {"ray_ddpm.output": uri})
    runs.log_params(run, {"data": uri, "deep": {"list": [uri]}})
    runs.log_dataset(run, uri, "f" * 32, 10)
    runs.log_config(run, {"data": uri})
    runs.end_run(run)
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"bucket/digits" in stored
    assert SECRET.encode() not in stored


def test_workers_are_told_of_mlflow_only_what_others_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert address.environment() == {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@mlflow:5000")
    assert address.environment() == {}


def test_the_command_that_shows_the_runs_listens_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://me:{SECRET}@db/mlflow")
    shown = address.ui_command()
    assert shown.endswith("--host 127.0.0.1") and SECRET not in shown


def test_what_is_installed_is_what_is_pinned() -> None:
    """This is the part of a dependency audit that needs no network. `pip-audit` finds known vulnerabilities."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version
        for name, _, version in (line.split(";")[0].strip().partition("==") for line in lines)
        if name and not name.startswith("#")
    }
    assert all(pins.values()), "every line pins one version"
    # Only this folder, since Ray adds packages of its own to sys.path.
    place = [sysconfig.get_path("purelib")]
    installed = {
        canonicalize_name(d.metadata["Name"]): d.version.partition("+")[0]
        for d in metadata.distributions(path=place)
    }
    unpinned = set(installed) - set(pins) - {"ray-ddpm", "pip", "setuptools", "wheel"}
    assert unpinned == set()
    assert {name: v for name, v in installed.items() if pins.get(name, v) != v} == {}


def test_installed_packages_agree_with_each_other() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
