"""MLflow's model registry: logs and registers exported models, and finds them by name."""

import contextlib
import hashlib
import json
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import yaml
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

import pipeline
from pipeline import storage
from pipeline.config import ModelSpec
from pipeline.errors import InputError
from pipeline.models.export import (
    CARD,
    CONFIG,
    WEIGHTS,
    Packed,
    model_fingerprint,
    pack_model,
    read_spec,
    summary,
)
from pipeline.models.sampling import SERVED
from pipeline.redact import printable
from pipeline.tracking import RUN_FILE, address, runs  # runs also for its settings of MLflow

MODEL_FOLDER = "model"
PICTURE = "samples.png"  # artifact of a run: samples of its trained model
MOST_WORDS = 4000  # characters; MLflow's databases hold up to 5,000
# Packages that `from pipeline import load_model, sample_images` imports, and that MLflow's servers import.
SERVED_WITH = ("mlflow", "torch", "numpy", "pandas", "safetensors", "fsspec", "PyYAML")
# Seconds for which calls to a registry that does not answer are repeated.
PATIENCE = 60.0


def log_model(run: runs.Run, folder: str | Path, name: str = "", alias: str = "") -> str:
    """Logs an exported model folder (path or URI) as a pyfunc, and registers it if `name` is given.

    A model that the run has already logged is not logged again, nor registered again under the same name, unless
    somebody has deleted it since. An alias that points to a newer version stays, because a resume of an older run
    calls this function again.

    Returns:
        `models:/NAME/VERSION` if it was registered, else `models:/ID` of the logged model.
    """
    client = runs.open_client()
    digest = model_fingerprint(str(folder))[:16]
    tags = client.get_run(run.id).data.tags
    uri = tags.get(tag := f"ray_ddpm.model.{digest}", "")
    if not (uri and runs.find(lambda: client.get_logged_model(uri.rpartition("/")[2]))):
        uri = _log(run, folder)
        client.set_tag(run.id, tag, uri)
    if not name:
        return uri
    known = hashlib.sha256(name.encode()).hexdigest()[:16]  # tag keys allow fewer characters
    version = tags.get(tag := f"ray_ddpm.version.{known}.{digest}", "")
    there = runs.find(lambda: client.get_model_version(name, version)) if version else None
    if not there or there.run_id != run.id:  # a name that was deleted and used again counts from 1 again
        with warnings.catch_warnings(action="ignore"):
            version = str(mlflow.register_model(uri, name).version)
        client.set_tag(run.id, tag, version)
    _describe(run, read_spec(str(folder)), name, version)
    if alias and int(client.get_registered_model(name).aliases.get(alias, 0)) < int(version):
        client.set_registered_model_alias(name, alias, version)
    return f"models:/{name}/{version}"


def _describe(run: runs.Run, spec: ModelSpec, name: str, version: str) -> None:
    """Describes a model version in tags and text, unless it has a description already."""
    client = runs.open_client()
    if client.get_model_version(name, version).description:
        return
    facts = spec.provenance
    tags: dict[str, Any] = {
        "schedule": spec.diffusion.schedule,
        "timesteps": spec.diffusion.timesteps,
        "image": f"{spec.image.size}x{spec.image.size}x{spec.image.channels}",
        **{key: facts[key] for key in ("data", "data_fingerprint", "steps") if key in facts},
        **_figures(client, run, facts.get("steps")),
    }
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, printable(str(value)))
    picture = ""
    if any(file.path == PICTURE for file in client.list_artifacts(run.id)):
        # The picture is linked on the server itself, because MLflow's pages don't show pictures embedded in the text.
        picture = f"![Samples](get-artifact?path={PICTURE}&run_uuid={run.id})\n\n"
    # The description is written last, because it marks the version as fully described.
    client.update_model_version(name, version, (picture + summary(spec))[:MOST_WORDS])


def _figures(client: mlflow.MlflowClient, run: runs.Run, steps: int | None) -> dict[str, float]:
    """Held-out bits/dim of the model and its standard error, if the run measured them at its last step."""
    figures = {}
    for name in ("bits_per_dim", "bits_per_dim_stderr"):
        last = max(client.get_metric_history(run.id, name), key=lambda point: point.step, default=None)
        if last and last.step == steps:
            figures[name] = last.value
    return figures


def _log(run: runs.Run, folder: str | Path) -> str:
    client = runs.open_client()
    client.list_artifacts(run.id)  # fails early if the artifact store does not answer
    status = client.get_run(run.id).info.status
    try:
        with (
            # MLflow warns that `predict` has no type hints. It brings its own filter, so the lines are kept, not ignored.
            warnings.catch_warnings(record=True),
            _on_this_machine(str(folder)) as here,
            tempfile.TemporaryDirectory() as temporary,
            mlflow.start_run(run_id=run.id, log_system_metrics=False),
        ):
            info = mlflow.pyfunc.log_model(
                name="model",
                # A script, not a pickled object, so that nothing is unpickled when the model is loaded.
                python_model=str(Path(__file__).with_name("pyfunc.py")),
                artifacts={MODEL_FOLDER: here, "code": str(_packed_code(Path(temporary)))},
                pip_requirements=requirements(),
                signature=_signature(read_spec(here)),
            )
    finally:
        client.update_run(run.id, status=status)  # start_run's exit has closed the run
    return str(info.model_uri)


def requirements() -> list[str]:
    """The requirements of a served model, all from public indexes. ray-ddpm itself is stored with the model."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in SERVED_WITH]


def _packed_code(folder: Path) -> Path:
    """Packs the package into a zip file that Python can import from."""
    package, packed = Path(pipeline.__file__).parent, folder / "ray-ddpm.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for source in sorted(package.rglob("*.py")):
            entry = zipfile.ZipInfo(
                str(source.relative_to(package.parent))
            )  # without a time, so that equal code gives equal bytes
            file.writestr(entry, source.read_bytes(), zipfile.ZIP_DEFLATED)
    return packed


def _signature(spec: ModelSpec) -> ModelSignature:
    """The model's signature. Without one, MLflow ignores all parameters."""
    kinds: dict[type, DataType] = {str: DataType.string, int: DataType.long, float: DataType.double}
    image = spec.image
    return ModelSignature(
        Schema([ColSpec(DataType.long, name, required=False) for name in ("label", "index")]),
        Schema([TensorSpec(np.dtype(np.uint8), (-1, image.size, image.size, image.channels))]),
        ParamSchema([ParamSpec(name, kinds[type(value)], value) for name, value in SERVED.items()]),
    )


@contextlib.contextmanager
def _on_this_machine(uri: str) -> Iterator[str]:
    """A model folder as a local path: the folder itself, or a temporary copy."""
    if storage.is_local(uri):
        yield storage.absolute(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / storage.name(uri)
        copy.mkdir()
        for file in (WEIGHTS, CONFIG, CARD):
            (copy / file).write_bytes(storage.read_bytes(storage.join(uri, file)))
        yield str(copy)


def resolve_model(model: str) -> tuple[Packed, str]:
    """Reads the model that a --model flag names.

    Args:
        model: path or URI of an exported model folder, `models:/NAME/VERSION`, `models:/NAME/latest` or
            `models:/NAME@ALIAS`.

    Returns:
        the packed model, and its name, in which an alias is replaced by the version that it points to now. No copy
        stays on this machine.

    Raises:
        InputError: there is no such model, it can't be read, or MLflow does not answer.
    """
    if re.fullmatch(r"models:/(?!m-)[^/@]+", model):  # models:/m-… is an id that MLflow itself gives
        raise InputError(
            f"--model {model}: which version? Give {model}@newest, {model}@ALIAS or {model}/VERSION"
        )
    if model.startswith("models:/"):
        return _download(model)
    if not storage.exists(model):
        raise InputError(
            f"--model {model}: no such folder; give an exported model folder, models:/NAME/VERSION or "
            "models:/NAME@ALIAS"
        )
    try:
        return pack_model(model), model
    except InputError as error:
        raise InputError(f"--model {error}") from None


def log_results(model: str, job: str, figures: dict[str, float], pictures: list[str]) -> None:
    """What a job found out about a model goes to the run that trained it: figures as `JOB/NAME`, pictures under `JOB`.

    Figures of a registered model also become tags of its version. A line on stderr says where they went, or why they did
    not: the caller has them anyway.

    Args:
        model: `models:/NAME/VERSION`, or the folder `model` of a training's output; another model has no run.
        pictures: URIs of files.
    """
    registered = re.fullmatch(r"models:/([^/@]+)/(\d+)", model)
    run_id = "" if registered else _run_beside(model)
    if not (registered or run_id):
        return

    def log() -> str:
        client = runs.open_client()
        run = run_id
        if registered:
            run = client.get_model_version(registered[1], registered[2]).run_id
            for figure, value in figures.items():
                client.set_model_version_tag(registered[1], registered[2], figure, f"{value:.6g}")
        for figure, value in figures.items() if run else ():
            client.log_metric(run, f"{job}/{figure}", value)
        for uri in pictures if run else ():
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / storage.name(uri)
                copy.write_bytes(storage.read_bytes(uri))
                client.log_artifact(run, str(copy), job)
        return run or ""

    try:
        if run := runs.wait_for_mlflow(log, PATIENCE):
            shown = address.how_to_open(run)
            print(f"{job}: figures and pictures are in the model's MLflow run: {shown}", file=sys.stderr)
    except InputError as error:
        print(f"{job}: the results are not in MLflow: {error}", file=sys.stderr)


def _run_beside(model: str) -> str:
    """The id of the run in whose output a model folder lies; "" where there is none, or MLflow's database is not here."""
    folder, _, name = model.rstrip("/").rpartition("/")
    if name != MODEL_FOLDER or not address.is_there():
        return ""
    try:
        return str(json.loads(storage.read_bytes(storage.join(folder or ".", RUN_FILE)))["run_id"])
    except Exception:  # no training's output, or out of reach, with errors of the storage's own kind
        return ""


def _download(model: str) -> tuple[Packed, str]:
    def download(target: str) -> tuple[Path, str]:
        client, pinned = runs.open_client(), model
        if match := re.fullmatch(r"models:/([^/@]+)@([^/@]+)", model):
            pinned = f"models:/{match[1]}/{client.get_model_version_by_alias(match[1], match[2]).version}"
        elif match := re.fullmatch(r"models:/([^/@']+)/latest", model):
            found = client.search_model_versions(f"name = '{match[1]}'")
            pinned = f"models:/{match[1]}/{max((int(one.version) for one in found), default='latest')}"
        logged = mlflow.artifacts.download_artifacts(artifact_uri=pinned, dst_path=target)
        return Path(logged).resolve(), pinned

    with tempfile.TemporaryDirectory() as target:
        try:
            logged, pinned = runs.wait_for_mlflow(lambda: download(target), PATIENCE)
        except InputError as error:
            raise InputError(f"--model {model}: {error}") from None
        try:
            flavour = yaml.safe_load((logged / "MLmodel").read_text())["flavors"]["python_function"]
            folder = (logged / flavour["artifacts"][MODEL_FOLDER]["path"]).resolve()
            if not folder.is_relative_to(logged):
                raise ValueError("a folder outside of the model")
            return pack_model(folder)._replace(where=pinned), pinned
        except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
            raise InputError(
                f"--model {model}: that model was not written by ray-ddpm (no {WEIGHTS} in it)"
            ) from None
