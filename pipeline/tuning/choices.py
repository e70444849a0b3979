"""Values of a search space with which no trial could be run, found before the first one is started."""

import itertools
import math
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from pipeline.errors import InputError
from pipeline.training.checks import check_length, check_settings
from pipeline.tuning.config import TuneConfig, base, finished
from pipeline.tuning.space import Space, apply

# Of a larger space not all combinations are tried: then each trial says what is wrong with its own.
MOST_COMBINATIONS = 10_000


def check_choices(config: TuneConfig, space: Space, rows: int) -> None:
    """Refuses a choice, or an end of a range, that goes with no choice of the other flags.

    Args:
        rows: images to train on.

    Raises:
        InputError: names the flag, its value, and what is wrong with that.
    """
    values = {name: _values(entry) for name, entry in space.entries.items()}
    if math.prod(map(len, values.values())) > MOST_COMBINATIONS:
        return
    good, wrong = set[tuple[str, Any]](), dict[tuple[str, Any], str]()
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        if chosen.items() <= good:
            continue
        trial = finished(config, apply(base(config), space.decode(chosen)))
        try:
            check_settings(trial)
            check_length(trial, rows)
            good |= chosen.items()
        except InputError as error:
            wrong |= dict.fromkeys(chosen.items(), str(error))
    if not good:
        raise InputError(f"--space: no trial could be run: {next(iter(wrong.values()))}")
    for (name, value), reason in wrong.items():
        if (name, value) not in good:
            raise InputError(f"--space: {name} {value}: no trial could be run with it: {reason}")


def _values(entry: BaseDistribution) -> list[Any]:
    return list(entry.choices) if isinstance(entry, CategoricalDistribution) else [entry.low, entry.high]
