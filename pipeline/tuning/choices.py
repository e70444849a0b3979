"""Values of a search space with which no trial could be run, found before the first one is started."""

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from pipeline.data.index import Splits
from pipeline.errors import BadSettings, InputError
from pipeline.training.checks import check_fit, check_length, check_settings
from pipeline.tuning.config import TuneConfig, base, finished
from pipeline.tuning.space import Flags, Space, apply

# Of more combinations a value stands in, so many are tried at random.
MOST_COMBINATIONS, TRIED = 10_000, 1_000


def check_choices(config: TuneConfig, space: Space, data: Splits) -> None:
    """Refuses a choice, or an end of a range, that goes with no choice of the other flags.

    Raises:
        InputError: names the flag, its value, and what is wrong with that.
    """
    values = {name: _values(entry) for name, entry in space.entries.items()}
    good = set[tuple[str, Any]]()

    def refusal(values: dict[str, list[Any]]) -> str:
        """What is wrong with the first of these combinations; "" where one is good."""
        first = ""
        for chosen in _combinations(values):
            try:
                check_trial(config, space.decode(chosen), data)
            except BadSettings as error:
                first = first or str(error)
            else:
                good.update(chosen.items())
                return ""
        return first

    if reason := refusal(values):
        raise InputError(f"--space: no trial could be run: {reason}")
    for name, choices in values.items():
        for value in choices:
            if (name, value) not in good and (reason := refusal({**values, name: [value]})):
                raise InputError(f"--space: {name} {value}: no trial could be run with it: {reason}")


def check_trial(config: TuneConfig, flags: Flags, data: Splits) -> None:
    """Whether the training that a trial's flags stand for could be begun: its schedule, its network, its rungs.

    Raises:
        BadSettings: says what is wrong with them.
    """
    try:
        trial = apply(base(config), flags)
        check_settings(trial)
        check_length(trial, data["train"].rows)
        check_fit(finished(config, trial), data)
    except InputError as error:
        raise BadSettings(str(error)) from None


def _values(entry: BaseDistribution) -> list[Any]:
    return list(entry.choices) if isinstance(entry, CategoricalDistribution) else [entry.low, entry.high]


def _combinations(values: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every way to choose one value of each, or many of them at random, the same each time."""
    if math.prod(map(len, values.values())) <= MOST_COMBINATIONS:
        yield from (dict(zip(values, some, strict=True)) for some in itertools.product(*values.values()))
        return
    chance = random.Random(0)
    yield from ({name: chance.choice(some) for name, some in values.items()} for _ in range(TRIED))
