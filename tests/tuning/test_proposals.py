"""Proposals: Optuna's choices on a known bound, proposals after a resume, and early stops of trials."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from pipeline.evaluation.config import BITS_PER_DIM, FRECHET
from pipeline.tuning import ledger
from pipeline.tuning.config import TuneConfig, rung_images
from pipeline.tuning.ledger import Record, Rung
from pipeline.tuning.proposals import Halving, Proposals
from pipeline.tuning.search import _Progress
from pipeline.tuning.space import parse_space
from tests.tuning.gaussian import known_bound

FLAGS = ("diffusion.schedule", "diffusion.timesteps", "diffusion.variance")
VALUES = (["linear", "quadratic", "cosine", "sigmoid"], [20, 40, 80], ["fixed_small", "fixed_large"])
SPACE = parse_space(dict(zip(FLAGS, VALUES, strict=True)))


@pytest.fixture(scope="module")
def known() -> dict[tuple[Any, ...], float]:
    """The exact bound of every schedule, T and variance."""
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
            assert len(set(values)) == 14  # no choice is tried twice
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
        Record(
            5, {FLAGS[0]: '"cosine"', FLAGS[1]: "20", FLAGS[2]: '"fixed_large"'}, {}, "interrupted", "why"
        ),
    ]
    for record in records:
        ledger.write(str(tmp_path), record)
    proposals = Proposals(TuneConfig("", str(tmp_path), trials=8), SPACE, records)
    flags = [proposals.suggest(name) for name in "abcde"]
    assert [proposals.names[name] for name in "abcde"] == ["0001", "0003", "0005", "0006", "0007"]
    assert flags[0] == records[1].flags
    assert flags[1] == records[3].flags
    old = [record.parameters for record in records]
    assert all(record.parameters not in old for record in ledger.read_all(str(tmp_path))[6:])


def test_two_objectives_are_told_to_optuna_together(tmp_path: Path) -> None:
    config = TuneConfig("", str(tmp_path), trials=6, objective="both")
    proposals = Proposals(config, SPACE, [])
    for i in range(6):
        assert isinstance(proposals.suggest(str(i)), dict)
        failed = i == 3
        result = {BITS_PER_DIM: 1.0 * i, FRECHET: -1.0 * i, "failed": failed}
        proposals.on_trial_complete(str(i), result)
    states = [trial.state.name for trial in proposals.study.get_trials()]
    assert states.count("COMPLETE") == 5
    assert len(proposals.study.best_trials) == 5


def test_what_optuna_is_told_after_a_resume_is_what_it_knew_before(tmp_path: Path) -> None:
    """Each trial has its settings, its state and its values in one study, under its number."""
    config = TuneConfig("", str(tmp_path), trials=6)
    proposals = Proposals(config, SPACE, [])
    for i, status in enumerate(("finished", "stopped", "failed")):
        proposals.suggest(str(i))
        proposals.on_trial_complete(str(i), {BITS_PER_DIM: 5.0 + i, "failed": status == "failed"})
        rungs = (Rung(100, 1, 0.0, {BITS_PER_DIM: 5.0 + i}),)
        record = replace(ledger.read(str(tmp_path), f"{i:04d}"), status=status, rungs=rungs)  # type: ignore[arg-type]
        ledger.write(str(tmp_path), record)

    def known(study: optuna.Study) -> list[Any]:
        return [(trial.params, trial.state, trial.values) for trial in study.get_trials()]

    resumed = Proposals(config, SPACE, ledger.read_all(str(tmp_path)))
    assert known(resumed.study) == known(proposals.study)
    assert [state.name for _, state, _ in known(resumed.study)] == ["COMPLETE", "COMPLETE", "FAIL"]


HALVING = TuneConfig("", "", images=900, rungs=3, reduction=3)
Measurement = tuple[str, int, float]


def play(seed: int) -> tuple[list[Measurement], list[bool]]:
    """Return measurements of 40 trials in order of arrival, and whether Ray's ASHA stops the trial at each."""
    rng = np.random.default_rng(seed)
    asha = ASHAScheduler(
        time_attr="images", metric=BITS_PER_DIM, mode="min", grace_period=100, max_t=900, reduction_factor=3
    )
    trials = [SimpleNamespace(trial_id=f"{number:04d}") for number in range(40)]
    ahead = {trial.trial_id: rung_images(HALVING) for trial in trials}
    for trial in trials:
        asha.on_trial_add(None, trial)  # type: ignore[arg-type]
    measured, stopped = [], []
    while left := [trial for trial in trials if ahead[trial.trial_id]]:
        trial = left[rng.integers(min(len(left), 6))]
        images, value = ahead[trial.trial_id].pop(0), float(rng.normal())
        if images == HALVING.images:
            continue
        answer = asha.on_trial_result(None, trial, {"images": images, BITS_PER_DIM: value})  # type: ignore[arg-type]
        measured.append((trial.trial_id, images, value))
        stopped.append(answer == "STOP")
        if stopped[-1]:
            ahead[trial.trial_id] = []
    return measured, stopped


def in_ledger(measured: list[Measurement]) -> list[Record]:
    rungs: dict[str, tuple[Rung, ...]] = {}
    for time, (name, images, value) in enumerate(measured):
        rungs[name] = (*rungs.get(name, ()), Rung(images, images, float(time), {BITS_PER_DIM: value}))
    return [Record(int(name), {}, {}, "running", rungs=some) for name, some in sorted(rungs.items())]


def ask(halving: Halving, measurement: Measurement) -> bool:
    name, images, value = measurement
    return halving(name, {"images": images, BITS_PER_DIM: value, "done": False})


@pytest.mark.parametrize("seed", range(3))
def test_trials_are_stopped_as_rays_own_asha_stops_them_also_after_a_resume(seed: int) -> None:
    measured, stopped = play(seed)
    names = {name: name for name, _, _ in measured}
    assert 20 < sum(stopped) < len(stopped) - 10
    halving = Halving(HALVING, [], names)
    assert [ask(halving, one) for one in measured] == stopped
    for end in range(len(measured)):  # killed after this measurement, before or after the answer
        resumed = Halving(HALVING, in_ledger(measured[: end + 1]), names)
        assert [ask(resumed, one) for one in measured[end : end + 5]] == stopped[end : end + 5]


def test_a_trial_that_is_at_its_end_is_not_stopped() -> None:
    halving = Halving(HALVING, in_ledger([("0000", 900, 1.0)]), {"a": "0001"})
    assert not halving("a", {"images": 900, BITS_PER_DIM: 2.0, "done": True})
    assert not halving.stop_all()


def test_by_two_metrics_no_end_of_the_front_is_stopped_and_what_many_dominate_is(tmp_path: Path) -> None:
    config = replace(HALVING, objective="both")
    names = {f"{number:04d}": f"{number:04d}" for number in range(40)}
    # The first twenty points are the front from (0, 9) to (9, 0), twice. The other twenty lie behind it by (1, 1).
    points = [(k % 10 + k // 20, 9 - k % 10 + k // 20) for k in range(40)]
    results = [{"images": 100, BITS_PER_DIM: float(x), FRECHET: float(y), "done": False} for x, y in points]
    halving = Halving(config, [], names)
    stopped = [halving(name, result) for name, result in zip(names, results, strict=True)]
    assert not any(stopped[:20])
    assert not stopped[20] and not stopped[29]  # worst by one metric, nearly best by the other
    behind = replace(config, reduction=20)
    records = [
        Record(
            k, {}, {}, "running", rungs=(Rung(100, 1, float(k), {BITS_PER_DIM: float(x), FRECHET: float(y)}),)
        )
        for k, (x, y) in enumerate(points[:20])
    ]
    resumed = Halving(behind, records, {**names, "a": "0099"})
    assert [resumed(name, result) for name, result in zip(names, results[:20], strict=False)] == [False] * 20
    assert resumed("a", {"images": 100, BITS_PER_DIM: 8.0, FRECHET: 8.0, "done": False})


def test_counting_trials_reads_no_ledger(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    progress = _Progress(TuneConfig("", str(tmp_path / "nowhere"), trials=2), over=1)
    result = {BITS_PER_DIM: 3.0, "seen": 1024}
    progress.on_trial_result(0, [], SimpleNamespace(last_result=result), result)
    progress.on_trial_complete(0, [], SimpleNamespace(last_result=result))
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("tune: 1/2 trials") and lines[1].startswith("tune: 2/2 trials")
    assert lines[1].endswith(f"after 1024 images: {BITS_PER_DIM} 3.0000")
