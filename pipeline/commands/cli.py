"""What every entry point does: parse flags, run, print one JSON line; one clear line on bad input."""

import contextlib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import tyro

from pipeline.cluster.session import connect, disconnect
from pipeline.config import RENAMED, from_dict, load_yaml
from pipeline.errors import InputError, Interrupted, JobFailed
from pipeline.redact import redact, refuse_secrets
from pipeline.tracking import runs

T = TypeVar("T")


def parse(cls: type[T], arguments: list[str], job: str, about: str) -> T:
    """Flags as a frozen dataclass; `--config FILE.yaml` gives the defaults that flags override.

    Raises:
        InputError: a flag or a value that does not exist, in one line.
        SystemExit: with code 0, after `--help`.
    """
    arguments, path = _take_option([_current_flag(word) for word in arguments], "--config")
    extra: dict[str, Any] = {}
    if path is not None:
        extra["default"] = _with_defaults(cls, load_yaml(path), f"--config {path}")
    description = (
        f"{about}\n\n--config FILE.yaml starts from saved settings, flags override them; --verbose lets "
        "the logs of Ray and MLflow through."
    )
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(
                cls, args=arguments, prog=program(job), description=description, config=markers, **extra
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(output.getvalue(), job)) from None


def main(
    job: str,
    about: str,
    cls: type[T],
    execute: Callable[[T], dict[str, Any]],
    arguments: list[str],
    *,
    check: Callable[[T], object] = lambda config: None,
    ray: bool = True,
) -> int:
    """Runs a job: its result is the last line on stdout, everything else goes to stderr.

    Args:
        execute: does the work, and returns the result.
        check: raises InputError for what is known to be wrong before Ray is joined or started.
        ray: join or start Ray first.

    Returns:
        the exit code: 0; 2 on bad input; 128 + its number after a signal; a submitted job's own; 1 after any
        other error, whose traceback is shown without secrets.
    """
    arguments, verbose = _take_switch(arguments, "--verbose")
    try:
        config = parse(cls, arguments, job, about)
        refuse_secrets(config)
        with result_stream() as stream:
            _quieten(verbose)
            check(config)
            if ray:
                connect(verbose, runs.environment())
            result = execute(config)
            print(json.dumps(result), file=stream, flush=True)
            if ray:
                # While stdout still leads to stderr: what Ray's core says as it goes must not follow the result.
                disconnect()
    except InputError as error:
        print(f"{job}: {' '.join(redact(str(error)).split())}", file=sys.stderr)
        return 2
    except (Interrupted, JobFailed) as error:
        print(f"{job}: {redact(str(error))}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"{job}: interrupted", file=sys.stderr)
        return 130
    except Exception:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        return 1
    return 0


def program(job: str) -> str:
    """How the job was called: as a script of a checkout, or through the command."""
    return f"jobs/{job}.py" if Path(sys.argv[0]).name == f"{job}.py" else f"ray-ddpm {job}"


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before a lone `--`, and what stands after it."""
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def _quieten(verbose: bool) -> None:
    if not verbose:
        runs.quieten()
        for name in ("mlflow", "alembic", "matplotlib", "fsspec", "urllib3", "httpx"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def result_stream() -> Iterator[IO[str]]:
    """The real stdout, while everything else that prints there is sent to stderr (at descriptor level)."""
    sys.stdout.flush()
    real = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        yield real
    finally:
        sys.stdout.flush()
        real.flush()
        os.dup2(real.fileno(), 1)
        real.close()


def _current_flag(word: str) -> str:
    """A flag by its present name."""
    flag, equals, value = word.partition("=")
    old = flag.removeprefix("--").replace("-", "_")
    return (
        f"--{RENAMED[old].replace('_', '-')}{equals}{value}"
        if flag.startswith("--") and old in RENAMED
        else word
    )


def _take_option(arguments: list[str], name: str) -> tuple[list[str], str | None]:
    for i, argument in enumerate(arguments):
        if argument == name:
            if i + 1 == len(arguments):
                raise InputError(f"{name} needs a file name after it")
            return arguments[:i] + arguments[i + 2 :], arguments[i + 1]
        if argument.startswith(f"{name}="):
            return arguments[:i] + arguments[i + 1 :], argument.partition("=")[2]
    return arguments, None


def _take_switch(arguments: list[str], name: str) -> tuple[list[str], bool]:
    return [a for a in arguments if a != name], name in arguments


def _with_defaults(cls: type[T], values: dict[str, Any], where: str) -> T:
    """`values` as `cls`, where a required field that is missing is still asked for as a flag."""
    import dataclasses

    required = {
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = required - set(values)
    config = from_dict(cls, values | dict.fromkeys(missing, ""), where)
    for name in missing:
        object.__setattr__(config, name, tyro.MISSING)
    return config


def _one_line(panel: str, job: str) -> str:
    """The sense of tyro's boxed error."""
    lines = [line.strip("│╭╮╰╯─ \t") for line in panel.splitlines()]
    kept = [
        line
        for line in lines
        if line and not line.startswith("For full helptext") and line != f"{program(job)} --help"
    ]
    return f"{' '.join(kept)} (see {program(job)} --help)"
