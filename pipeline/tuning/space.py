"""The search space: the flags of jobs/train.py that a search varies, read from YAML (space.yaml shows the format).

A trial's flags are a dict from dotted names of TrainConfig's fields to values. Optuna sees one parameter for each entry
of the space. Values for which it has no type (lists, flags that are chosen together) are passed as JSON.
"""

import dataclasses
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from pipeline import storage
from pipeline.config import (
    RENAMED,
    ImageConfig,
    TrainConfig,
    from_dict,
    leaf_fields,
    load_yaml,
    nearest_name,
    to_dict,
)
from pipeline.errors import InputError
from pipeline.ranges import check_ranges
from pipeline.redact import one_line

DEFAULT_SPACE = Path(__file__).with_name("space.yaml")
# Flags that the search itself sets, in the same way for every trial.
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
        entries: Optuna's distribution of each entry, by name.
        together: names of the entries whose values hold several flags, as JSON.
    """

    fixed: Flags
    entries: dict[str, BaseDistribution]
    together: frozenset[str]

    def decode(self, parameters: dict[str, Any]) -> Flags:
        """Converts Optuna's parameters to all flags of a trial."""
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
        """The whole space as JSON values, for logging."""
        return self.fixed | {name: str(entry) for name, entry in self.entries.items()}

    @property
    def schedule_files(self) -> list[str]:
        """Paths of the files with betas that the space names."""
        some = [self.fixed]
        for name, entry in self.entries.items():
            if isinstance(entry, CategoricalDistribution):
                some += [self.decode({name: choice}) for choice in entry.choices]
        schedules = {flags.get("diffusion.schedule", "") for flags in some}
        return sorted(schedule for schedule in schedules if Path(schedule).is_file())


def load_space(path: str = "", flags: Flags | None = None) -> Space:
    """Reads a space file.

    Args:
        path: path of the file; "" = the default space.
        flags: entries to add to the file, in the same format; see `fitted`.

    Raises:
        InputError: the file can't be read, names an unknown flag or a wrong value, or contains nothing to search.
    """
    where = f"--space {path}" if path else "the default space"
    return parse_space(load_yaml(path or str(DEFAULT_SPACE), "--space") | (flags or {}), where)


def fitted(image: ImageConfig, rows: int) -> Flags:
    """The entries of the default space that depend on the images, in the format of a space file.

    The UNet halves images until their width is odd or at most 8 pixels, and any even width at least once. It attends at
    halved widths of at most 16 pixels. Larger images get more channels and smaller batches. Data with classes gets a
    class-conditional model.

    Args:
        rows: number of training images; a batch is at most that large.
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
    """Makes a space from the contents of its YAML file; see `load_space`.

    Args:
        where: origin of the values, for messages.

    Raises:
        InputError: an unknown flag, a wrong value, or nothing to search.
    """
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
            if get_origin(leaf_fields(TrainConfig)[flag]) is tuple and not all(
                isinstance(x, list) for x in value
            ):
                raise InputError(f"{where}: {flag}: one value is a list itself: write [{json.dumps(value)}]")
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
    """The dotted name of a TrainConfig field.

    Args:
        name: the dotted name, the bare name, or the flag.
        where: origin of the name, for messages.

    Raises:
        InputError: no such flag exists, or the search itself sets it.
    """
    wanted = name.lstrip("-").replace("-", "_")
    wanted = RENAMED.get(wanted, wanted)
    found = [flag for flag in leaf_fields(TrainConfig) if wanted in (flag, flag.rpartition(".")[2])]
    if not found:
        near = nearest_name(wanted, TrainConfig).rpartition(".")[2]
        hint = f"did you mean {near}?" if near else "see its --help"
        if any(flag.startswith(f"{wanted}.") for flag in leaf_fields(TrainConfig)):
            hint = f"write its flags as {wanted}.NAME, each on a line of its own"
        raise InputError(f"{where}: {name!r} is not a flag of the train job: {hint}")
    if found[0] in RESERVED:
        raise InputError(f"{where}: {name!r} is set by the search itself (see jobs/tune.py --help)")
    return found[0]


def apply(config: TrainConfig, flags: Flags) -> TrainConfig:
    """Replaces some flags of a training run.

    Raises:
        InputError: a value of the wrong type.
    """
    values = to_dict(config)
    for flag, value in flags.items():
        group, _, leaf = flag.rpartition(".")
        (values[group] if group else values)[leaf] = value
    return from_dict(TrainConfig, values, "trial")


def train_command(config: TrainConfig) -> str:
    """The command line for exactly this training run: jobs/train.py with every flag that is not at its default."""
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
    """Checks a value, and makes the path of a file absolute, because trials run in other folders.

    Raises:
        InputError: the flag can't have this value.
    """
    try:
        check_ranges(apply(TrainConfig(data="", output=""), {flag: value}))
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('trial.')}") from None
    is_path = flag == "diffusion.schedule" and Path(value).is_file()
    return storage.absolute(value) if is_path else value


def _choice(values: list[str], name: str, where: str) -> CategoricalDistribution:
    if not values:
        raise InputError(f"{where}: {name}: the list is empty")
    if len(set(values)) < len(values):
        raise InputError(f"{where}: {name}: the same value is listed twice")
    return CategoricalDistribution(values)


def _range(flag: str, value: dict[str, Any], where: str) -> BaseDistribution:
    kind = leaf_fields(TrainConfig)[flag]
    if kind not in (int, float):
        raise InputError(f"{where}: {flag} is not a number: give a list of values")
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
