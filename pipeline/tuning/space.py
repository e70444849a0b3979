"""The search space: which flags of jobs/train.py a search varies, read from YAML (see space.yaml for its form).

A trial's choice is a dict from dotted names of TrainConfig's fields to values. Optuna sees one parameter for each
entry of the space; a value that it has no type for (a list, flags chosen together) travels as JSON.
"""

import dataclasses
import difflib
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from pipeline import storage
from pipeline.config import RENAMED, ImageConfig, TrainConfig, from_dict, leaf_fields, load_yaml, to_dict
from pipeline.errors import InputError
from pipeline.ranges import check_ranges
from pipeline.redact import one_line

DEFAULT_SPACE = Path(__file__).with_name("space.yaml")
# What the search itself decides, the same way for every trial.
RESERVED = frozenset(
    [
        "data",
        "output",
        "workers",
        "min_workers",
        "cpus_per_worker",
        "gpus_per_worker",
        "cache_dir",
        "cache_gb",
        "steps",
        "resume",
        "experiment",
        "run_name",
        "register",
        "alias",
        "log_every",
        "checkpoint_every",
    ]
)

Flags = dict[str, Any]


@dataclass(frozen=True)
class Space:
    """A search space.

    Attributes:
        fixed: flags that are the same for every trial.
        entries: by name, Optuna's distribution.
        together: names of the entries whose values are several flags, as JSON.
    """

    fixed: Flags
    entries: dict[str, BaseDistribution]
    together: frozenset[str]

    def decode(self, parameters: dict[str, Any]) -> Flags:
        """All flags of a trial, from Optuna's parameters."""
        flags = dict(self.fixed)
        for name, value in parameters.items():
            if name in self.together:
                flags |= json.loads(value)
            elif isinstance(value, str) and isinstance(self.entries[name], CategoricalDistribution):
                flags[name] = json.loads(value)
            else:
                flags[name] = value
        return flags

    @property
    def shown(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return self.fixed | {name: str(entry) for name, entry in self.entries.items()}

    @property
    def schedule_files(self) -> list[str]:
        """The files of betas that it names."""
        some = [self.fixed]
        for name, entry in self.entries.items():
            if isinstance(entry, CategoricalDistribution):
                some += [self.decode({name: choice}) for choice in entry.choices]
        schedules = {flags.get("diffusion.schedule", "") for flags in some}
        return sorted(schedule for schedule in schedules if Path(schedule).is_file())


def load_space(path: str = "", flags: Flags | None = None) -> Space:
    """Reads a space file; the default one where `path` is empty.

    Args:
        flags: what to add to the file, in the same form; see `fitted`.

    Raises:
        InputError: the file can't be read, an unknown flag, a value that the flag can't have, nothing to search.
    """
    where = f"--space {path}" if path else "the default space"
    return parse_space(load_yaml(path or str(DEFAULT_SPACE), "--space") | (flags or {}), where)


def fitted(image: ImageConfig, rows: int) -> Flags:
    """What the default space has for images of this size and these classes, in the form of a space file.

    The UNet halves images down to 8 pixels, at least once, and attends where they are small. A larger image gets more
    channels and a smaller batch. Data with classes gets a class-conditional model.

    Args:
        rows: images to train on; a batch has no more.
    """
    sizes = [image.size]
    while sizes[-1] % 2 == 0 and (sizes[-1] > 8 or len(sizes) == 1):
        sizes.append(sizes[-1] // 2)
    batch_size = 128 if image.size <= 32 else 64 if image.size <= 64 else 32
    flags: Flags = {
        "batch_size": min(batch_size, rows),
        "model.channel_multipliers": [[1, *[2] * (len(sizes) - 1)]],
        "model.attention_resolutions": [[size for size in sizes[1:] if size <= 16]],
        "model.model_channels": [32, 64] if image.size <= 16 else [64, 128],
    }
    if len(image.classes) > 1:
        flags |= {"model.class_conditional": True, "label_dropout": [0.05, 0.1, 0.2]}
    return flags


def parse_space(values: dict[str, Any], where: str = "--space") -> Space:
    """A space from what its YAML says; see `load_space`."""
    fixed: Flags = {}
    entries: dict[str, BaseDistribution] = {}
    together = set()
    owners: dict[str, str] = {}

    def claim(flag: str, owner: str) -> None:
        if owners.setdefault(flag, owner) != owner:
            raise InputError(f"{where}: {flag} is set twice, by {owners[flag]!r} and by {owner!r}")

    for name, value in values.items():
        name = str(name)
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            groups = []
            for item in value:
                flags = {resolve_flag(str(flag), where): here for flag, here in item.items()}
                group = {flag: _checked(flag, here, where) for flag, here in flags.items()}
                for flag in group:
                    claim(flag, name)
                groups.append(json.dumps(group, sort_keys=True))
            together.add(name)
            entries[name] = _choice(groups, name, where)
            continue
        flag = resolve_flag(name, where)
        claim(flag, name)
        if isinstance(value, dict):
            entries[flag] = _range(flag, value, where)
        elif isinstance(value, list):
            items = [_checked(flag, item, where) for item in value]
            if len(items) == 1:
                fixed[flag] = items[0]
            else:
                entries[flag] = _choice([json.dumps(item) for item in items], flag, where)
        else:
            fixed[flag] = _checked(flag, value, where)
    if "image_size" in owners and "image_size" not in fixed:
        raise InputError(f"{where}: image_size: trials are compared on the same images: give one value")
    if not entries:
        raise InputError(f"{where}: nothing to search: give at least one flag a list of values or a range")
    return Space(fixed, entries, frozenset(together))


def resolve_flag(name: str, where: str = "--space") -> str:
    """The dotted name of a TrainConfig field, from that, from the bare name or from the flag's spelling.

    Raises:
        InputError: no such flag, or one that the search itself sets.
    """
    wanted = name.lstrip("-").replace("-", "_")
    wanted = RENAMED.get(wanted, wanted)
    found = [flag for flag in leaf_fields(TrainConfig) if wanted in (flag, flag.rpartition(".")[2])]
    if not found:
        leaves = [flag.rpartition(".")[2] for flag in leaf_fields(TrainConfig)]
        near = difflib.get_close_matches(wanted.rpartition(".")[2], leaves, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else "see its --help"
        raise InputError(f"{where}: {name!r} is no flag of the train job: {hint}")
    if found[0] in RESERVED:
        raise InputError(f"{where}: {name!r} is set by the search itself (see jobs/tune.py --help)")
    return found[0]


def apply(config: TrainConfig, flags: Flags) -> TrainConfig:
    """A training run with some of its flags replaced.

    Raises:
        InputError: a value of the wrong type.
    """
    values = to_dict(config)
    for flag, value in flags.items():
        group, _, leaf = flag.rpartition(".")
        (values[group] if group else values)[leaf] = value
    return from_dict(TrainConfig, values, "trial")


def train_command(config: TrainConfig) -> str:
    """The command line that trains exactly this: jobs/train.py and every flag that isn't at its default."""
    words = ["python", "jobs/train.py"]

    def walk(value: Any, defaults: dict[str, Any]) -> None:
        for field in dataclasses.fields(value):
            here = getattr(value, field.name)
            if dataclasses.is_dataclass(here):
                walk(here, _defaults(type(here)))
                continue
            default = defaults.get(field.name, dataclasses.MISSING)
            if here == default or field.name == "betas":
                continue
            flag = f"--{field.name.replace('_', '-')}"
            if isinstance(here, bool) and default is False:
                words.append(flag)
            else:
                items = here if isinstance(here, tuple) else (here,)
                words.extend([flag, *(str(item) for item in items)])

    walk(config, _defaults(TrainConfig))
    return shlex.join(words)


def _defaults(cls: Any) -> dict[str, Any]:
    defaults = {}
    for field in dataclasses.fields(cls):
        if field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
    return defaults


def _checked(flag: str, value: Any, where: str) -> Any:
    """A value that the flag can have; the path of a file as the trials need it, which run in other folders."""
    try:
        check_ranges(apply(TrainConfig(data="", output=""), {flag: value}))
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('trial.')}") from None
    is_path = flag == "diffusion.schedule" and Path(value).is_file()
    return storage.absolute(value) if is_path else value


def _choice(values: list[str], name: str, where: str) -> CategoricalDistribution:
    if not values:
        raise InputError(f"{where}: {name}: an empty list")
    if len(set(values)) < len(values):
        raise InputError(f"{where}: {name}: a value stands there twice")
    return CategoricalDistribution(values)


def _range(flag: str, value: dict[str, Any], where: str) -> BaseDistribution:
    kind = leaf_fields(TrainConfig)[flag]
    if kind not in (int, float):
        raise InputError(f"{where}: {flag} is no number: give a list of values")
    if unknown := set(value) - {"low", "high", "log", "step"}:
        raise InputError(
            f"{where}: {flag}: unknown key {min(map(str, unknown))!r}; known: low, high, log, step"
        )

    def number(name: str) -> Any:
        given = value[name]
        cut = kind is int and isinstance(given, float) and not given.is_integer()
        if type(given) not in (int, float) or not math.isfinite(given) or cut:
            raise ValueError(f"{name}: {given!r} is not a finite {'whole ' if kind is int else ''}number")
        return kind(given)

    try:
        low, high, log = number("low"), number("high"), value.get("log", False)
        if not isinstance(log, bool):
            raise TypeError(f"log: {log!r} is neither true nor false")
        step = None if value.get("step") is None else number("step")
        if kind is int:
            distribution: BaseDistribution = IntDistribution(
                low, high, log=log, step=1 if step is None else step
            )
        else:
            distribution = FloatDistribution(low, high, log=log, step=step)
    except KeyError as error:
        raise InputError(f"{where}: {flag}: a range needs {error}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: {flag}: {one_line(error)}") from None
    for end in (low, high):
        _checked(flag, end, where)
    return distribution


optuna.logging.set_verbosity(optuna.logging.WARNING)
