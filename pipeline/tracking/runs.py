"""MLflow runs: parameters, curves, datasets, artifacts.

Only the driver talks to MLflow: workers hand their numbers to it (see training/run_channel.py), so one run has
one writer, whatever restarts, and workers need neither the server's address nor its credentials.
"""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from pipeline.errors import InputError
from pipeline.redact import one_line, printable, redact
from pipeline.tracking import address
from pipeline.tracking.address import tracking_uri

T = TypeVar("T")
_PARAMS_A_CALL = 100
_METRICS_A_CALL = 1000
if address.is_quiet:
    mlflow.utils.logging_utils.disable_logging()


@dataclass(frozen=True)
class Run:
    """An open MLflow run.

    Attributes:
        last_steps: the last step that is already in each of the curves asked for.
    """

    id: str
    last_steps: dict[str, int] = field(default_factory=dict)


def open_client() -> mlflow.MlflowClient:
    """A client of the server, or database, that `tracking_uri` names."""
    mlflow.set_tracking_uri(tracking_uri())
    return mlflow.MlflowClient()


def start_run(
    experiment: str, name: str, params: dict[str, Any], tags: dict[str, str], parent: str = ""
) -> Run:
    """Opens a new run.

    Args:
        parent: id of the run that this one is shown under.

    Raises:
        InputError: the server or the database can't be reached.
    """
    try:
        client = open_client()
        shown = {key: redact(value) for key, value in tags.items()}
        nested = {"mlflow.parentRunId": parent} if parent else {}
        experiment_id = _raced(lambda: _experiment_id(client, experiment))
        run = client.create_run(experiment_id, run_name=name or None, tags=shown | nested)
        values = [
            Param(key, printable(redact(str(value)))[:6000]) for key, value in sorted(_flat(params).items())
        ]
        for i in range(0, len(values), _PARAMS_A_CALL):
            client.log_batch(run.info.run_id, params=values[i : i + _PARAMS_A_CALL])
    except (MlflowException, OSError) as error:
        raise InputError(f"MLflow at {redact(tracking_uri())}: {one_line(error)}") from None
    return Run(run.info.run_id)


def _experiment_id(client: mlflow.MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))


def _raced(call: Callable[[], T]) -> T:
    """Makes a call again that lost a race: MLflow looks for a row and then inserts it, and trials start together."""
    for pause in (0.1, 0.5, 2.0):
        try:
            return call()
        except MlflowException as error:
            if not re.search("(?i)unique|duplicate|already exists", str(error)):
                raise
            time.sleep(pause)
    return call()


def last_steps(run_id: str, curves: tuple[str, ...]) -> dict[str, int] | None:
    """The last step in each of a run's curves, -1 where there is none; None when MLflow no longer has the run."""
    client = open_client()
    try:
        client.get_run(run_id)  # the histories of no run are empty
        histories = {curve: client.get_metric_history(run_id, curve) for curve in curves}
    except MlflowException:
        return None
    return {curve: max((p.step for p in history), default=-1) for curve, history in histories.items()}


def reopen_run(run_id: str, curves: tuple[str, ...]) -> Run | None:
    """Goes on with a run after a restart; None when MLflow no longer has it."""
    client = open_client()
    try:
        histories = {curve: client.get_metric_history(run_id, curve) for curve in curves}
        client.update_run(run_id, status="RUNNING")
    except MlflowException:
        return None
    return Run(run_id, {c: max((p.step for p in history), default=-1) for c, history in histories.items()})


def has_points(run_id: str, curves: tuple[str, ...]) -> bool:
    """Whether a run has a point of one of these curves; True also where MLflow can't say."""
    client = open_client()
    try:
        client.get_run(run_id)  # the histories of no run are empty
        return any(client.get_metric_history(run_id, curve) for curve in curves)
    except MlflowException:
        return True


def end_run(run: Run, status: str = "FINISHED", reason: str = "") -> None:
    """Closes a run as FINISHED, FAILED or KILLED; why is kept as a tag."""
    if reason:
        open_client().set_tag(run.id, "ray_ddpm.reason", redact(reason))
    open_client().set_terminated(run.id, status)


def delete_children(run: Run, keep: set[str]) -> None:
    """Deletes the nested runs of a run other than those with the ids to keep."""
    client = open_client()
    experiment = client.get_run(run.id).info.experiment_id
    for child in client.search_runs(
        [experiment], f"tags.`mlflow.parentRunId` = '{run.id}'", max_results=50_000
    ):
        if child.info.run_id not in keep:
            client.delete_run(child.info.run_id)


def log_points(run: Run, points: list[tuple[int, int, dict[str, float]]]) -> None:
    """Adds to the curves: (milliseconds since 1970, step, values) each."""
    metrics = [
        Metric(key, value, time, step) for time, step, values in points for key, value in values.items()
    ]
    for i in range(0, len(metrics), _METRICS_A_CALL):
        open_client().log_batch(run.id, metrics=metrics[i : i + _METRICS_A_CALL])


def log_dataset(run: Run, uri: str, fingerprint: str, rows: int, quarantined: int = 0) -> None:
    """Names the training data in the run, by place and content fingerprint, and counts what was left out of it."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    dataset = MetaDataset(
        CodeDatasetSource({"uri": redact(uri)}),
        name=uri.rstrip("/").rpartition("/")[2],
        digest=fingerprint[:32],
    )
    tags = [InputTag("mlflow.data.context", "training"), InputTag("rows", str(rows))]
    inputs = [DatasetInput(dataset._to_mlflow_entity(), tags)]
    _raced(lambda: open_client().log_inputs(run.id, inputs))
    open_client().log_metric(run.id, "quarantined_images", quarantined)


def log_file(run: Run, path: Path, folder: str = "") -> None:
    """Uploads one file as an artifact."""
    open_client().log_artifact(run.id, str(path), folder or None)


def log_bytes(run: Run, path: str, content: bytes) -> None:
    """Uploads an artifact to its path in the run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(path).name
        file.write_bytes(content)
        log_file(run, file, str(Path(path).parent))


def log_config(run: Run, config: dict[str, Any]) -> None:
    """Keeps the whole configuration as `config.yaml`; `--config` takes it as it is."""
    import yaml

    open_client().log_text(run.id, redact(yaml.safe_dump(config, sort_keys=False)), "config.yaml")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
