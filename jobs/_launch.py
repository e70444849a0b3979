"""The common part of every jobs/NAME.py: calls pipeline/commands/NAME.py, or says how to set up its environment."""

import importlib
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]


def launch(job: str) -> NoReturn:
    """Ends the process with the job's exit code, or with 2 if this Python can't run the job."""
    if sys.version_info < (3, 11):  # noqa: UP036  (users of an older Python need this message)
        refuse(
            job, f"Python 3.11 or newer is needed, and this is {sys.version_info[0]}.{sys.version_info[1]}"
        )
    try:
        command = importlib.import_module(f"pipeline.commands.{job}")
    except ModuleNotFoundError as error:
        refuse(job, f"this Python ({sys.executable}) has no package {error.name!r}")
    # An installed package may serve these scripts. Another checkout would run code that is not beside the scripts.
    tree = Path(str(command.__file__)).resolve().parents[2]
    if tree != ROOT and (tree / "pyproject.toml").exists():
        refuse(job, f"this Python ({sys.executable}) runs the code of {tree}, not of {ROOT}")
    sys.exit(command.main(sys.argv[1:]))


def refuse(job: str, reason: str) -> NoReturn:
    """Says what is missing and what to do about it."""
    setup = "`make setup` makes the environment, `source .venv/bin/activate` enters it"
    print(f"{job}: {reason}: {setup}", file=sys.stderr)
    sys.exit(2)
