"""The address of MLflow. MLflow itself is not imported, which takes seconds, because most jobs need it only later."""

import os
import re
import sys
from pathlib import Path

from pipeline.cluster.session import submitted_settings
from pipeline.errors import InputError
from pipeline.redact import redact

is_quiet = False
# A database file, or the folder of a file store. The path after the slashes of sqlite:/// is relative.
_FILE = re.compile(
    r"(?P<scheme>sqlite(\+\w+)?:///|file:(?=[^/]))?(?P<path>(?!databricks|\w[\w+.-]*:)[^?]+)(?P<query>\?.*)?"
)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or else a database file `mlflow.db` in the working directory. Paths are made absolute.

    Processes with another working directory get the address from `environment`.

    Raises:
        InputError: the working directory belongs to a submitted job, so it is deleted later.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return _absolute(uri)
    if "working_dir" in submitted_settings():
        raise InputError(
            "MLFLOW_TRACKING_URI is not set on the cluster: set it where its nodes are started, or submit with "
            "--forward MLFLOW_TRACKING_URI"
        )
    return f"sqlite:///{Path('mlflow.db').absolute()}"


def _absolute(uri: str) -> str:
    """An address in which a relative path to a file or folder is made absolute."""
    if (found := _FILE.fullmatch(uri)) and not found["path"].startswith(":memory:"):
        return f"{found['scheme'] or ''}{Path(found['path']).absolute()}{found['query'] or ''}"
    return uri


def environment() -> dict[str, str]:
    """The environment variables that workers on other nodes need, without secrets. Nodes have secrets of their own."""
    if "MLFLOW_TRACKING_URI" not in os.environ and submitted_settings():
        return {}
    uri = tracking_uri()
    return {"MLFLOW_TRACKING_URI": uri} if redact(uri) == uri else {}


def with_secrets() -> dict[str, str]:
    """All variables that another process needs to reach MLflow. Pass them as an argument, which nobody else can see."""
    names = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
    known = {name: os.environ[name] for name in names if name in os.environ}
    return {"MLFLOW_TRACKING_URI": tracking_uri()} | known


def ui_command() -> str:
    """The command that shows the runs in a browser, on this machine only."""
    return f"mlflow ui --backend-store-uri {redact(tracking_uri())} --host 127.0.0.1"


def is_there() -> bool:
    """Whether MLflow may be asked without making a new database: that file exists, or it is no file."""
    found = _FILE.fullmatch(tracking_uri())
    return found is None or Path(found["path"]).exists()


def how_to_open(run_id: str) -> str:
    """The page of a run in MLflow's user interface, and the command that serves it where no server does."""
    uri = redact(tracking_uri())
    page = f"/#/runs/{run_id}"
    if uri.startswith(("http://", "https://")):
        return uri.rstrip("/") + page
    return f"{ui_command()} shows it at http://127.0.0.1:5000{page}"


def quieten() -> None:
    """Turns off MLflow's progress bars and log lines on stderr, whether it is already imported or not."""
    global is_quiet
    is_quiet = True
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    if mlflow := sys.modules.get("mlflow"):
        mlflow.utils.logging_utils.disable_logging()
