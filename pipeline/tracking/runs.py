"""MLflow runs: parameters, curves, datasets and artifacts.

Only the driver talks to MLflow. Workers send their numbers to the driver (see training/run_channel.py). So a run has
a single writer whatever restarts, and workers need neither the server's address nor its credentials.
"""

import contextlib
import fcntl
import functools
import getpass
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline import storage
from pipeline.errors import InputError
from pipeline.patience import patiently
from pipeline.redact import one_line, printable, redact
from pipeline.tracking import address
from pipeline.tracking.address import tracking_uri

T = TypeVar("T")
CONFIG_FILE = "config.yaml"
_PARAMS_A_CALL = 100
_METRICS_A_CALL = 1000
OPENING = "ray_ddpm.opening"  # tag that identifies the call that opened a run
# By default, a call to a server that does not answer fails only after minutes. Callers here repeat calls themselves
# and report it.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
# Error codes of a server for calls that will never succeed.
_GONE = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "NOT_IMPLEMENTED")
_ERRORS = (MlflowException, OSError, SQLAlchemyError)  # of server, artifact store, database
_NOT_ALLOWED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
if address.is_quiet:
    mlflow.utils.logging_utils.disable_logging()


@dataclass(frozen=True)
class Run:
    """An open MLflow run.

    Attributes:
        id: MLflow's id of the run.
        last_steps: last step that MLflow has, by curve; None if MLflow could not be asked.
    """

    id: str
    last_steps: dict[str, int] | None = field(default_factory=dict)


def open_client() -> mlflow.MlflowClient:
    """A client of the server or database that `tracking_uri` names."""
    uri = tracking_uri()
    mlflow.set_tracking_uri(uri)
    if uri.startswith("sqlite:///"):
        _use_first(uri)
    try:
        return mlflow.MlflowClient()
    except ModuleNotFoundError as error:  # the driver of a database
        raise InputError(
            f"MLflow at {redact(uri)}: needs a package that is not installed: {error.name}"
        ) from None


@functools.cache
def _use_first(uri: str) -> None:
    """Opens a database file for the first time in this process, one process at a time, since this creates its tables."""
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock is a separate file, because on network file systems it would conflict with SQLite's own lock.
    with Path(f"{path}.lock").open("a") as beside:
        with contextlib.suppress(OSError):  # the file system has no locks
            fcntl.flock(beside, fcntl.LOCK_EX)
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)


def is_refused(error: Exception) -> bool:
    """True if MLflow answered, and will never accept the same call."""
    return isinstance(error, MlflowException) and error.error_code in _REFUSED


def may_pass(error: Exception) -> bool:
    """True if MLflow does not answer at the moment, so that the same call may succeed later."""
    if isinstance(error, MlflowException):
        return error.error_code not in (*_GONE, *_REFUSED, *_NOT_ALLOWED)
    if isinstance(error, (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return False  # errors of a database file
    return isinstance(error, (OSError, SQLAlchemyError))


def find(get: Callable[[], T]) -> T | None:
    """The result of a call that looks for something; None if MLflow answers that it does not exist."""
    try:
        return get()
    except MlflowException as error:
        if error.error_code in _GONE:
            return None
        raise


def wait_for_mlflow(
    do: Callable[[], T],
    seconds: float,
    say: Callable[[str], object] = lambda line: print(line, file=sys.stderr),
) -> T:
    """Repeats a call until MLflow answers.

    Args:
        seconds: time after which it gives up.

    Raises:
        InputError: MLflow did not answer in that time, or refused the call.
    """
    what = f"MLflow at {redact(tracking_uri())} does not answer"
    try:
        return patiently(do, what, seconds, say, may_pass)
    except _ERRORS as error:
        raise InputError(f"MLflow at {redact(tracking_uri())}: {one_line(error)}") from None


def start_run(experiment: str, name: str, tags: dict[str, str], parent: str = "", opening: str = "") -> Run:
    """Opens a new run.

    Args:
        parent: id of the run under which this one is shown.
        opening: mark that all attempts to open this run share. Runs from earlier attempts are deleted.

    Raises:
        MlflowException: MLflow failed; a database raises errors of its own. See `wait_for_mlflow`.
    """
    client = open_client()
    shown = {key: redact(value) for key, value in tags.items()}
    nested = {"mlflow.parentRunId": parent} if parent else {}
    experiment_id = _raced(lambda: _experiment_id(client, experiment))
    marks = {OPENING: opening} if opening else {}
    run = client.create_run(experiment_id, run_name=name or None, tags=shown | nested | marks)
    if opening:
        for other in client.search_runs([experiment_id], f"tags.`{OPENING}` = '{opening}'"):
            if other.info.run_id != run.info.run_id:
                client.delete_run(other.info.run_id)
    return Run(run.info.run_id)


def origin(job: str) -> dict[str, str]:
    """Tags with the program and the user of a run. MLflow shows both, but its client sets neither."""
    tags = {"mlflow.source.name": f"ray-ddpm {job}", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def open_run(
    experiment: str, name: str, tags: dict[str, str], seconds: float, parent: str = "", opening: str = ""
) -> Run:
    """Opens exactly one new run, even if answers of MLflow get lost, and waits while MLflow does not answer.

    Args:
        seconds: how long to wait.
        parent: see `start_run`.
        opening: see `start_run`; by default a new mark.

    Raises:
        InputError: as `wait_for_mlflow`.
    """
    opening = opening or uuid.uuid4().hex
    return wait_for_mlflow(lambda: start_run(experiment, name, tags, parent, opening), seconds)


@contextlib.contextmanager
def failed_on_error(run: Run) -> Iterator[None]:
    """Ends a new run as FAILED if the block fails.

    The block writes the run's id to the output. Without it no resume would find the run.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(*_ERRORS):
            end_run(run, "FAILED", reason=one_line(error))
        raise


def _experiment_id(client: mlflow.MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))


def _raced(call: Callable[[], T]) -> T:
    """Repeats a call that lost a race. MLflow first looks for a row and then inserts it, and trials start together."""
    for pause in (0.1, 0.5, 2.0):
        try:
            return call()
        except MlflowException as error:
            if not re.search("(?i)unique|duplicate|already exists", str(error)):
                raise
            time.sleep(pause)
    return call()


def reopen_run(run_id: str, curves: tuple[str, ...]) -> Run | None:
    """Continues a run after a restart; None if the run was deleted or belongs to another database.

    Raises:
        MlflowException: MLflow failed, which says nothing about the run; a database raises errors of its own. See
            `wait_for_mlflow`.
    """
    client = open_client()
    try:
        if client.get_run(run_id).info.lifecycle_stage != "active":
            return None
        histories = {curve: client.get_metric_history(run_id, curve) for curve in curves}
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code in _GONE:
            return None
        raise
    return Run(run_id, {c: max((p.step for p in history), default=-1) for c, history in histories.items()})


def reopen_later(run_id: str, curves: tuple[str, ...]) -> Run | None:
    """As `reopen_run`, but if MLflow does not answer, returns the run with unknown last steps."""
    try:
        return reopen_run(run_id, curves)
    except _ERRORS:
        return Run(run_id, None)


def has_points(run_id: str, curves: tuple[str, ...]) -> bool:
    """True if a run has a point on one of these curves, or if MLflow can't tell."""
    try:
        client = open_client()
        client.get_run(run_id)  # raises if there is no such run; its histories would just be empty
        return any(client.get_metric_history(run_id, curve) for curve in curves)
    except _ERRORS:
        return True


def end_run(run: Run, status: str = "FINISHED", reason: str = "") -> None:
    """Closes a run as FINISHED, FAILED or KILLED, and keeps the reason as a tag."""
    if reason:
        open_client().set_tag(run.id, "ray_ddpm.reason", redact(reason))
    open_client().set_terminated(run.id, status)


def log_params(run: Run, params: dict[str, Any]) -> None:
    """Logs settings as MLflow parameters, nested ones with dotted names. Those that the run has already stay."""
    there = open_client().get_run(run.id).data.params
    values = [
        Param(key, printable(redact(str(value)))[:6000])
        for key, value in sorted(_flat(params).items())
        if key not in there
    ]
    for i in range(0, len(values), _PARAMS_A_CALL):
        open_client().log_batch(run.id, params=values[i : i + _PARAMS_A_CALL])


def log_points(run: Run, points: list[tuple[int, int, dict[str, float]]]) -> None:
    """Adds points to the curves, each (milliseconds since 1970, step, values by curve)."""
    metrics = [
        Metric(key, value, time, step) for time, step, values in points for key, value in values.items()
    ]
    for i in range(0, len(metrics), _METRICS_A_CALL):
        open_client().log_batch(run.id, metrics=metrics[i : i + _METRICS_A_CALL])


def log_dataset(run: Run, uri: str, fingerprint: str, rows: int, quarantined: int = 0) -> None:
    """Logs the training data's name and fingerprint, its number of rows, and the number of images left out."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    dataset = MetaDataset(
        CodeDatasetSource({"uri": storage.title(uri)}),
        name=storage.name(storage.title(uri)),
        digest=fingerprint[:32],
    )
    tags = [InputTag("mlflow.data.context", "training"), InputTag("rows", str(rows))]
    inputs = [DatasetInput(dataset._to_mlflow_entity(), tags)]
    _raced(lambda: open_client().log_inputs(run.id, inputs))
    open_client().log_metric(run.id, "quarantined_images", quarantined, timestamp=0, step=0)


def log_file(run: Run, path: Path, folder: str = "") -> None:
    """Uploads one file as an artifact."""
    open_client().log_artifact(run.id, str(path), folder or None)


def log_bytes(run: Run, path: str, content: bytes) -> None:
    """Uploads bytes as an artifact at `path`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(path).name
        file.write_bytes(content)
        log_file(run, file, path.rpartition("/")[0])


def log_config(run: Run, config: dict[str, Any]) -> None:
    """Logs the whole configuration as `config.yaml`, a file that `--config` accepts, unless the run has one already."""
    import yaml

    if CONFIG_FILE not in [file.path for file in open_client().list_artifacts(run.id)]:
        open_client().log_text(run.id, redact(yaml.safe_dump(config, sort_keys=False)), CONFIG_FILE)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
