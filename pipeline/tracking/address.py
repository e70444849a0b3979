"""Where MLflow is. Imports nothing of MLflow, which takes seconds: most jobs end or start Ray before they need it."""

import os
import re
import sys
import warnings
from pathlib import Path

from pipeline.cluster.session import submitted_settings
from pipeline.errors import InputError
from pipeline.redact import redact

is_quiet = False
# A database file, or the folder of a file store: after the slashes of sqlite:/// a path is relative.
_FILE = re.compile(
    r"(?P<scheme>sqlite(\+\w+)?:///|file:(?=[^/]))?(?P<path>(?!databricks|\w[\w+.-]*:)[^?]+)(?P<query>\?.*)?"
)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a database file `mlflow.db` in the working directory; no relative path.

    Processes elsewhere, whose working directory is another one, get it from `environment`.

    Raises:
        InputError: that directory is a submitted job's own, which goes away.
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
    """An address with the file or folder that it names, if it does, as seen from any working directory."""
    if (found := _FILE.fullmatch(uri)) and not found["path"].startswith(":memory:"):
        return f"{found['scheme'] or ''}{Path(found['path']).absolute()}{found['query'] or ''}"
    return uri


def environment() -> dict[str, str]:
    """What workers on other nodes need of it, without secrets: those belong to the nodes' own environment."""
    if "MLFLOW_TRACKING_URI" not in os.environ and submitted_settings():
        return {}
    uri = tracking_uri()
    return {"MLFLOW_TRACKING_URI": uri} if redact(uri) == uri else {}


def with_secrets() -> dict[str, str]:
    """All that another process needs to reach MLflow: to be handed over as an argument, which nobody else is shown."""
    names = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
    known = {name: os.environ[name] for name in names if name in os.environ}
    return {"MLFLOW_TRACKING_URI": tracking_uri()} | known


def ui_command() -> str:
    """The one command that shows the runs in a browser, on this machine only."""
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
    """No progress bars and no chatter from MLflow on stderr, now or when it is imported."""
    global is_quiet
    is_quiet = True
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    warnings.filterwarnings("ignore", message=".*Add type hints to the `predict` method")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    if mlflow := sys.modules.get("mlflow"):
        mlflow.utils.logging_utils.disable_logging()
