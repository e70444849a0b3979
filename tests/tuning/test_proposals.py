"""Proposals: Optuna's choices on a bound that is known, and what a resume proposes."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.search import Searcher

from pipeline.errors import InputError
from pipeline.evaluation.config import BITS_PER_DIM, FRECHET
from pipeline.tuning import ledger
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.ledger import Record, Rung
from pipeline.tuning.proposals import Proposals, make_scheduler
from pipeline.tuning.space import parse_space
from tests.tuning.gaussian import known_bound

FLAGS = ("diffusion.schedule", "diffusion.timesteps", "diffusion.variance")
VALUES = (["linear", "quadratic", "cosine", "sigmoid"], [20, 40, 80], ["fixed_small", "fixed_large"])
SPACE = parse_space(dict(zip(FLAGS, VALUES, strict=True)))


@pytest.fixture(scope="module")
def known() -> dict[tuple[Any, ...], float]:
    """The bound of every schedule, T and variance."""
    return {choice: known_bound(*choice) for choice in itertools.product(*VALUES)}


def run(known: dict[tuple[Any, ...], float], config: TuneConfig) -> list[float]:
    proposals = Proposals(config, SPACE, [])
    values = []
    for i in range(config.trials):
        flags = proposals.suggest(str(i))
        assert isinstance(flags, dict)
        values.append(known[tuple(flags[flag] for flag in FLAGS)])
        proposals.on_trial_complete(str(i), {BITS_PER_DIM: values[-1]})
    return values


def test_tpe_comes_closer_to_the_known_best_than_random_choices_at_equal_budget(
    known: dict[tuple[Any, ...], float], tmp_path: Path
) -> None:
    best, regret = min(known.values()), dict[str, list[float]]()
    for searcher in ("tpe", "random"):
        regret[searcher] = []
        for seed in range(12):
            config = TuneConfig(
                "", str(tmp_path / f"{searcher}-{seed}"), trials=14, searcher=searcher, seed=seed
            )  # type: ignore[arg-type]
            values = run(known, config)
            assert len(set(values)) == 14  # nothing is tried twice
            regret[searcher].append(min(values) - best)
    print(f"mean regret {np.mean(regret['tpe']):.4f} against {np.mean(regret['random']):.4f} bits/dim")
    assert np.mean(regret["tpe"]) < np.mean(regret["random"])


def test_a_space_that_is_used_up_ends_the_search(tmp_path: Path) -> None:
    space = parse_space({"diffusion.schedule": ["linear", "cosine"]})
    proposals = Proposals(TuneConfig("", str(tmp_path), trials=5), space, [])
    found = [proposals.suggest(str(i)) for i in range(3)]
    assert {one["diffusion.schedule"] for one in found[:2]} == {"linear", "cosine"}  # type: ignore[index]
    assert found[2] == Searcher.FINISHED


def measured(number: int, value: float, status: ledger.Status, **flags: Any) -> Record:
    parameters = {FLAGS[0]: '"linear"', FLAGS[1]: "20", FLAGS[2]: '"fixed_small"'}
    rungs = (Rung(100, 1, float(number), {BITS_PER_DIM: value}),)
    return Record(number, parameters, {"diffusion.schedule": "linear", **flags}, status, rungs=rungs)


def test_a_resume_proposes_unfinished_trials_under_their_own_number_and_no_finished_one(
    tmp_path: Path,
) -> None:
    records = [
        measured(0, 3.0, "finished"),
        measured(1, 4.0, "running", seed=7),
        measured(2, 5.0, "stopped"),
        Record(3, {FLAGS[0]: '"cosine"', FLAGS[1]: "40", FLAGS[2]: '"fixed_small"'}, {"seed": 8}, "waiting"),
        Record(4, {FLAGS[0]: '"cosine"', FLAGS[1]: "80", FLAGS[2]: '"fixed_small"'}, {}, "failed", "why"),
    ]
    for record in records:
        ledger.write(str(tmp_path), record)
    proposals = Proposals(TuneConfig("", str(tmp_path), trials=7), SPACE, records)
    flags = [proposals.suggest(name) for name in "abcd"]
    assert [proposals.names[name] for name in "abcd"] == ["0001", "0003", "0005", "0006"]
    assert flags[0] == records[1].flags
    assert flags[1] == records[3].flags
    old = [record.parameters for record in records]
    assert all(record.parameters not in old for record in ledger.read_all(str(tmp_path))[5:])


def test_two_objectives_are_told_to_optuna_together(tmp_path: Path) -> None:
    config = TuneConfig("", str(tmp_path), trials=6, objective="both")
    proposals = Proposals(config, SPACE, [])
    for i in range(6):
        assert isinstance(proposals.suggest(str(i)), dict)
        failed = i == 3
        result = {BITS_PER_DIM: 1.0 * i, FRECHET: -1.0 * i, "failed": failed}
        proposals.on_trial_complete(str(i), result)
    states = [trial.state.name for trial in proposals._study.get_trials()]
    assert states.count("COMPLETE") == 5
    assert len(proposals._study.best_trials) == 5


def test_asha_counts_what_was_measured_before_a_resume() -> None:
    config = TuneConfig("", "", scheduler="asha", images=900, rungs=3, reduction=3)
    before = [measured(i, 1.0 + i, "stopped") for i in range(6)]
    verdicts = {}
    for name, records in (("resumed", before), ("new", [])):
        scheduler = make_scheduler(config, SPACE, records)
        assert scheduler is not None
        trial = SimpleNamespace(trial_id="late")
        scheduler.on_trial_add(None, trial)
        verdicts[name] = scheduler.on_trial_result(None, trial, {"images": 100, BITS_PER_DIM: 4.0})
    assert verdicts == {"resumed": "STOP", "new": "CONTINUE"}


def test_population_based_training_needs_something_that_can_change() -> None:
    config = TuneConfig("", "", scheduler="pbt")
    with pytest.raises(InputError, match="learning_rate"):
        make_scheduler(config, SPACE, [])
    space = parse_space({"learning_rate": {"low": 0.001, "high": 0.01}, "schedule": ["linear", "cosine"]})
    scheduler = make_scheduler(config, space, [])
    assert list(scheduler._hyperparam_mutations) == ["optimizer.learning_rate"]  # type: ignore[union-attr]
