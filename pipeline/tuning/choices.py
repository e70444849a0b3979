"""Finds values of a search space with which no trial could run, before the first trial starts."""

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

# If a value occurs in more combinations than the first number, the second number of them are tried at random.
MOST_COMBINATIONS, TRIED = 10_000, 1_000


def check_choices(config: TuneConfig, space: Space, data: Splits) -> None:
    """Refuses a choice, or an end of a range, that works with no choice of the other flags.

    Raises:
        InputError: no trial could run with a value; the message names the flag, the value and the reason.
    """
    values = {name: _values(entry) for name, entry in space.entries.items()}
    good = set[tuple[str, Any]]()

    def refusal(values: dict[str, list[Any]]) -> str:
        """The fault of the first combination; "" if any combination works."""
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
        where = "--space" if config.space else "the default search space (--space FILE names another)"
        raise InputError(f"{where}: no trial could be run: {reason}")
    for name, choices in values.items():
        for value in choices:
            if (name, value) not in good and (reason := refusal({**values, name: [value]})):
                raise InputError(f"--space: {name} {value}: no trial could be run with it: {reason}")


def check_trial(config: TuneConfig, flags: Flags, data: Splits) -> None:
    """Checks that the training of a trial with these flags could begin: its schedule, its network and its rungs.

    Raises:
        BadSettings: it could not; the message gives the reason.
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
    """All combinations of one value each, or many of them at random if there are too many. Always the same."""
    if math.prod(map(len, values.values())) <= MOST_COMBINATIONS:
        yield from (dict(zip(values, some, strict=True)) for some in itertools.product(*values.values()))
        return
    chance = random.Random(0)
    yield from ({name: chance.choice(some) for name, some in values.items()} for _ in range(TRIED))
