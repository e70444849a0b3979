"""MLflow's model registry: exported models logged, registered, and found again by name."""

import contextlib
import io
import re
import tempfile
import warnings
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

from pipeline import storage
from pipeline.errors import InputError
from pipeline.redact import one_line, redact
from pipeline.tracking import runs

MODEL_FOLDER = "model"


def log_model(run: runs.Run, folder: Path, name: str = "", alias: str = "") -> str:
    """Logs an exported model folder as a pyfunc, and registers it when `name` is given.

    Returns:
        `models:/NAME/VERSION` when registered, else `models:/ID` of the logged model.
    """
    mlflow.set_tracking_uri(runs.tracking_uri())
    # Registering prints to stderr by itself, and warns that this model declares no schema of its input.
    quiet = contextlib.redirect_stderr(io.StringIO())
    with (
        quiet,
        warnings.catch_warnings(action="ignore"),
        mlflow.start_run(run_id=run.id, log_system_metrics=False),
    ):
        info = mlflow.pyfunc.log_model(
            name="model",
            # A script, not a pickled object: nothing is unpickled when the model is loaded.
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={MODEL_FOLDER: str(folder)},
            pip_requirements=["ray-ddpm"],
            registered_model_name=name or None,
        )
    # start_run's exit closes the run; the caller does that.
    runs.open_client().update_run(run.id, status="RUNNING")
    if not name:
        return str(info.model_uri)
    version = str(info.registered_model_version)
    if alias:
        runs.open_client().set_registered_model_alias(name, alias, version)
    return f"models:/{name}/{version}"


def resolve_model(model: str) -> tuple[Path, str]:
    """Turns a MODEL into a folder on this machine.

    Args:
        model: a path or a URI of an exported model folder, `models:/NAME/VERSION`, `models:/NAME@ALIAS`.

    Returns:
        the folder, and the model's name with its alias pinned to the version it points at now.

    Raises:
        InputError: no such model.
    """
    if not model.startswith("models:/"):
        if not storage.is_local(model):
            return _fetch_model(model), model
        path = Path(model).expanduser()
        if not path.is_dir():
            raise InputError(
                f"--model {model}: no such folder; give an exported model folder, models:/NAME/VERSION "
                "or models:/NAME@ALIAS"
            )
        return path.absolute(), str(path)
    pinned = model
    try:
        client = runs.open_client()
        if match := re.fullmatch(r"models:/([^/@]+)@([^/@]+)", model):
            pinned = f"models:/{match[1]}/{client.get_model_version_by_alias(match[1], match[2]).version}"
        target = tempfile.mkdtemp(prefix="ray-ddpm-model-")
        local = Path(mlflow.artifacts.download_artifacts(artifact_uri=pinned, dst_path=target))
    except (MlflowException, OSError) as error:
        raise InputError(
            f"--model {model}: not found in MLflow at {redact(runs.tracking_uri())}: {one_line(error)}"
        ) from None
    # pyfunc keeps artifacts under their key, or under the folder's own name.
    for config in sorted(local.rglob("config.json")):
        if (config.parent / "model.safetensors").exists():
            return config.parent, pinned
    raise InputError(f"--model {model}: that model was not written by ray-ddpm (no model.safetensors in it)")


def _fetch_model(uri: str) -> Path:
    if not storage.exists(uri):
        raise InputError(f"--model {uri}: no such folder")
    folder = Path(tempfile.mkdtemp(prefix="ray-ddpm-model-"))
    for file in storage.list_files(uri):
        (folder / storage.name(file)).write_bytes(storage.read_bytes(file))
    return folder
