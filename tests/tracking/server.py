"""A real MLflow server on this machine."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.jobs.common import database
from tests.system.served import LOOPBACK, answers, free_ports, wait_for


@contextlib.contextmanager
def mlflow_server(home: Path) -> Iterator[int]:
    """Start a server with database and artifacts in `home`, yield its port, and end it."""
    (port,) = free_ports(1)
    words = [
        str(Path(sys.executable).with_name("mlflow")), "server", f"--host={LOOPBACK}", f"--port={port}", "--workers=1",
        f"--backend-store-uri={database(home)}", "--serve-artifacts", f"--artifacts-destination={home}/artifacts",
    ]  # fmt: skip
    # MLflow's own job runners would each occupy a core while they start, and no test needs them.
    idle = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            words, cwd=home, env={**os.environ, **idle}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for("MLflow", lambda: answers(f"http://{LOOPBACK}:{port}/health"), needed=[server])
        yield port
    finally:
        os.killpg(server.pid, 9)
        server.wait()
