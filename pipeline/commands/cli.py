"""The common part of all entry points: parse flags, run, print one JSON line, or one clear line on bad input."""

import contextlib
import dataclasses
import difflib
import gc
import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal, TypeVar

import tyro

# tyro prints a box of several lines for a wrong command line. Its events hold the same facts, which fit one line.
from tyro._errors import BadValue, InvalidChoice, MissingArgs, ParseErrorEvent, on_parse_error

from pipeline.cluster.session import cluster_address, connect_later, connect_now, disconnect
from pipeline.commands import attempts
from pipeline.commands.help import HELP
from pipeline.config import (
    REMOVED,
    RENAMED,
    VALUES_ELSEWHERE,
    from_dict,
    leaf_fields,
    load_yaml,
    nearest_name,
)
from pipeline.display import quieten, reader_may_leave, redirected, status
from pipeline.errors import InputError, Interrupted, JobFailed
from pipeline.output import to_json
from pipeline.ranges import check_ranges
from pipeline.redact import one_line, printable, redact, refuse_secrets
from pipeline.tracking import address

T = TypeVar("T")

# Objects made between two searches for garbage in a job's process. At Python's default of 700 the searches take a sixth
# of the time of the imports.
COLLECT_AFTER = 50_000

# Messages of Python, in words that need no Python.
PLAIN = {
    "invalid literal for int() with base 10: ": "no whole number: ",
    "could not convert string to float: ": "no number: ",
}


def parse(cls: type[T], arguments: list[str], job: str, about: str) -> T:
    """Parses flags into a frozen dataclass. Flags override the settings of `--config FILE.yaml`.

    Args:
        cls: the dataclass.
        job: name of the job.
        about: description for `--help`.

    Raises:
        InputError: an unknown flag, a wrong value or a number outside of its range, in one line.
        SystemExit: after `--help`, with code 0.
    """
    arguments, path = _take_option([_current_flag(word) for word in arguments], "--config")
    extra: dict[str, Any] = {}
    if path is not None:
        extra["default"] = _with_defaults(cls, load_yaml(path), f"--config {path}")
    description = (
        f"{about.strip()}\n\n--config FILE.yaml reads settings from a file; flags override them. --verbose shows the "
        "logs of Ray and MLflow."
    )
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)

    def refuse(event: ParseErrorEvent) -> None:
        raise InputError(f"{_mistake(event, cls, arguments)} (see {program(job)} --help)")

    with on_parse_error(refuse), reader_may_leave():
        config = tyro.cli(
            cls,
            args=arguments,
            prog=program(job),
            description=description,
            config=markers,
            registry=HELP,
            **extra,
        )
    for name in _required(cls):
        # Such as --output "$RUNS" where RUNS is not set. It would mean the working directory.
        if getattr(config, name) == "":
            raise InputError(f"--{name.replace('_', '-')} is empty (see {program(job)} --help)")
    check_ranges(config)
    return config


def _mistake(event: ParseErrorEvent, cls: type, arguments: list[str]) -> str:
    """Says in one line what is wrong with the command line `arguments`, from tyro's event."""
    unknown: list[str] = getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", [])
    if flag := next((word.partition("=")[0] for word in unknown if word.startswith("-")), None):
        if reason := REMOVED.get(flag.removeprefix("--").replace("-", "_")):
            return f"{flag} is gone, since {reason}: leave it out"
        if near := nearest_name(flag, cls):
            return f"no flag {flag}: did you mean {_flag(near)}?"
        return f"no flag {flag}" + ": flags of JOB follow a lone --" * ("job" in leaf_fields(cls))
    if unknown:
        switches = {_flag(name) for name, hint in leaf_fields(cls).items() if hint is bool}
        words = [part for word in arguments for part in word.split("=", 1)]
        for word, value in itertools.pairwise(words):
            if value == unknown[0] and word.replace("_", "-") in switches:
                return f"{word} takes no value: give it alone, or leave it out"
        return f"{unknown[0]!r} is not a flag: flags begin with --"
    if isinstance(event, MissingArgs):
        return "required and not given: " + ", ".join(_name(part.arg) for part in event.missing_arguments)
    argument = getattr(event, "argument", None)
    flag = _name(argument) if argument else "the flags"
    kind = str(argument.lowered.metavar) if argument else ""
    if isinstance(event, InvalidChoice):
        elsewhere = VALUES_ELSEWHERE.get(event.value.lower(), "")
        close = (
            [elsewhere]
            if elsewhere in event.choices
            else difflib.get_close_matches(event.value, event.choices, n=1)
        )
        hint = f" (did you mean {close[0]}?)" if close else ""
        return (
            f"{flag} {event.value}: give one of {', '.join(event.choices)}{hint}{_commas(kind, event.value)}"
        )
    if isinstance(event, BadValue):
        missing = event.offending_value is None
        return f"{flag}: a value is missing: {kind}" if missing else f"{flag} takes no value"
    message = one_line(getattr(event, "message", type(event).__name__))
    for pythons, plain in PLAIN.items():
        message = message.replace(pythons, plain)
    return f"{flag}{' expects ' * bool(kind)}{kind}: {message}{_commas(kind, message)}"


def _commas(kind: str, value: str) -> str:
    """A hint for who wrote several values with commas."""
    return "; write spaces between values, no commas" if " " in kind and "," in value else ""


def _name(argument: Any) -> str:
    """The name of a flag or of a positional argument, as the user writes it."""
    return str(
        argument.field.intern_name.upper() if argument.is_positional() else argument.lowered.name_or_flags[0]
    )


def _flag(name: str) -> str:
    """A setting's flag, as the user types it, from its dotted name."""
    return f"--{name.rpartition('.')[2].replace('_', '-')}"


def _required(cls: Any) -> set[str]:
    """The settings that have no default."""
    return {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }


def main(
    job: str,
    about: str,
    cls: type[T],
    execute: Callable[..., dict[str, Any]],
    arguments: list[str],
    *,
    check: Callable[[T], Any] | None = None,
    ray: Literal["at once", "when needed", "never"] = "at once",
    workers: Callable[[T], str] = lambda config: "ray.data",
    meanwhile: Callable[[], object] = lambda: None,
    environment: Callable[[T], dict[str, str]] = lambda config: {},
) -> int:
    """Runs a job. Its result is the last line on stdout, and everything else goes to stderr.

    Args:
        job: name of the job.
        about: description for `--help`.
        cls: dataclass of the job's configuration.
        execute: does the work and returns the result; called with the configuration and the result of `check`.
        arguments: the command line after the job's name.
        check: called with the configuration before Ray is joined or started; raises InputError for bad input.
        ray: when Ray is joined or started; "when needed" leaves that to `connect_now`.
        workers: modules that most of the job's workers need, separated by commas.
        meanwhile: prepares in a thread what `execute` needs, while Ray starts. Its errors are ignored, because `execute`
            meets them again.
        environment: returns variables for all workers from the configuration.

    Returns:
        the exit code: 0 on success, 2 on bad input, 128 + N after signal N, a submitted job's own code, or 1 after any
        other error, whose traceback is shown without secrets.
    """
    if line := attempts.refused(job, arguments):
        print(f"{job}: {line}", file=sys.stderr)
        return 2
    given = arguments
    arguments, verbose = _take_switch(arguments, "--verbose")
    thresholds = gc.get_threshold()
    gc.set_threshold(COLLECT_AFTER)
    heard = list[int]()
    former = _interrupt_at_sigterm(heard)
    try:
        config = parse(cls, arguments, job, about)
        refuse_secrets(config)
        with result_stream() as stream:
            if not verbose:
                quieten()
                address.quieten()
            if ray != "never":
                # Must come before the check, which joins the cluster itself if it has much data to read.
                variables = {**address.environment(), **environment(config)}
                connect_later(verbose, variables, workers(config), soon=ray == "at once")
            if check:
                status.show(f"{job}: opening the data")
            checked = (check(config),) if check else ()
            if ray == "at once":
                place = redact(cluster_address())
                status.show(f"{job}: joining Ray at {place}" if place else f"{job}: starting Ray")
                _start(meanwhile)
                connect_now()
            status.clear()
            result = execute(config, *checked)
            print(to_json(result), file=stream, flush=True)
            if ray != "never":
                # Must come while stdout leads to stderr, so that no output of Ray's core follows the result.
                disconnect()
    except InputError as error:
        line = printable(" ".join(redact(str(error)).split()))
        print(f"{job}: {line}", file=sys.stderr)
        attempts.keep(job, given, error, line)
        return 2
    except (Interrupted, JobFailed) as error:
        print(f"{job}: {redact(str(error))}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        number = heard[0] if heard else signal.SIGINT
        print(f"{job}: ended by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + number
    except Exception:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        return 1
    finally:
        status.clear()
        gc.set_threshold(*thresholds)
        if former is not None:
            signal.signal(signal.SIGTERM, former)
    return 0


def training_workers(config: Any) -> str:
    """Modules that workers of a training run. DDP imports torch._dynamo, which takes two seconds."""
    return "pipeline.training.worker" + ",torch._dynamo" * (config.workers > 1)


def open_tracking() -> None:
    """Imports MLflow and creates the tables of a new database, which takes seconds."""
    from pipeline.tracking import runs

    runs.open_client()


def _start(work: Callable[[], object]) -> None:
    """Calls `work` in a thread, and ignores its errors."""

    def run() -> None:
        with contextlib.suppress(Exception):
            work()

    # Not a daemon thread, because its end would leave a new database incomplete.
    threading.Thread(target=run, name="meanwhile").start()


def _interrupt_at_sigterm(heard: list[int]) -> Any:
    """Makes SIGTERM end the job as Ctrl-C does.

    Args:
        heard: list that receives the signal's number.

    Returns:
        the former handler; None outside of the main thread, which can set no handler.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, interrupt)


def program(job: str) -> str:
    """The program name as the user called it: `jobs/JOB.py`, or `ray-ddpm JOB`."""
    return f"jobs/{job}.py" if Path(sys.argv[0]).name == f"{job}.py" else f"ray-ddpm {job}"


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before a lone `--`, and those after it."""
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


@contextlib.contextmanager
def result_stream() -> Iterator[IO[str]]:
    """Yields the real stdout. Everything else that is printed to stdout goes to stderr."""
    with redirected(1, 2) as real, os.fdopen(os.dup(real), "w") as stream:
        yield stream


def _current_flag(word: str) -> str:
    """The present form of a flag that was renamed; any other word as it is."""
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
    """Converts `values` to `cls`. A required field that is missing must still be given as a flag."""
    missing = _required(cls) - set(values)
    config = from_dict(cls, values | dict.fromkeys(missing, ""), where)
    for name in missing:
        object.__setattr__(config, name, tyro.MISSING)
    return config
