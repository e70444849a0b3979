"""Decides which trials a search runs and stops early, from the ledger, so that it also works after a kill."""

from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from ray.tune import Stopper
from ray.tune.search import Searcher

from pipeline.tuning import ledger
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.ledger import Record, dominating
from pipeline.tuning.space import Space
from pipeline.tuning.trial import FAILED, IMAGES

# Random proposals to try until one is new. In an exhausted space none is.
ATTEMPTS = 500


class Proposals(Searcher):
    """Numbers the trials that Optuna proposes, and writes them into the ledger.

    Optuna is told how the ledger's trials ended. Unfinished trials come first, under their own numbers.
    """

    def __init__(self, config: TuneConfig, space: Space, records: list[Record]) -> None:
        super().__init__(metric=list(config.metrics), mode=["min"] * len(config.metrics))
        self.names: dict[str, str] = {}
        self._config, self._space = config, space
        self._unfinished = [record for record in records if not record.over]
        self._taken = {_key(record.parameters) for record in records}
        self._next = max((record.number for record in records), default=-1) + 1
        self._asked: dict[str, optuna.trial.Trial] = {}
        # A resume uses another seed, because the same one would propose the first trials again.
        seed = (config.seed * 100_003 + len(records)) % 2**32
        self._chance = optuna.samplers.RandomSampler(seed=(seed + 2**31) % 2**32)  # unlike the other one
        self._sampler = _sampler(config, seed)
        directions = ["minimize"] * len(config.metrics)
        self.study = optuna.create_study(sampler=self._sampler, directions=directions)
        self.study.add_trials([_told(record, config, space) for record in records if record.over])

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The flags of the next trial; see Ray Tune's Searcher."""
        if self._unfinished:
            record = self._unfinished.pop(0)
            self.study.enqueue_trial(record.parameters)
            asked = self.study.ask(self._space.entries)
        elif (new := self._ask_new()) is not None:
            asked = new
            record = Record(self._next, asked.params, self._space.decode(asked.params))
            self._next += 1
            self._taken.add(_key(asked.params))
            ledger.write(self._config.output, record)
        else:
            return Searcher.FINISHED
        self._asked[trial_id], self.names[trial_id] = asked, record.name
        return dict(record.flags)

    def _ask_new(self) -> optuna.trial.Trial | None:
        """Parameters that no trial has had, because equal settings train equal models; None if there are none left.

        TPE proposes the best known parameters again and again. Then a random choice replaces its proposal.
        """
        for sampler in (self._sampler, *[self._chance] * ATTEMPTS):
            self.study.sampler = sampler
            asked = self.study.ask(self._space.entries)
            if _key(asked.params) not in self._taken:
                return asked
            self.study.tell(asked, state=TrialState.FAIL)
        return None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells Optuna how a trial ended."""
        asked = self._asked[trial_id]
        if error or not result or result.get(FAILED):
            self.study.tell(asked, state=TrialState.FAIL, skip_if_finished=True)
        else:
            self.study.tell(asked, [result[name] for name in self._config.metrics], skip_if_finished=True)

    def save(self, checkpoint_path: str) -> None:
        """Does nothing, because the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing; see `save`."""


class Halving(Stopper):
    """Asynchronous successive halving (Li et al. 2020, algorithm 2; one bracket, trials are stopped instead of paused).

    A trial continues if it is among the best 1/`reduction` of the trials measured at the same rung before it. The
    first trial at a rung always continues. With two metrics, a trial continues unless more than 1/`reduction` of the
    others dominate it: are at least as good in both metrics and better in one (Fonseca & Fleming 1993). So neither
    end of the Pareto front is ever stopped. Asked again about a trial, it gives the same answer.

    Args:
        records: the ledger at the start of the search.
        names: trial names by Ray Tune's ids.
    """

    def __init__(self, config: TuneConfig, records: list[Record], names: dict[str, str]) -> None:
        self._metrics, self._reduction, self._names = config.metrics, config.reduction, names
        # Metrics by the rung's images, then by the trial's name, in the order of the measurements.
        self._rungs: dict[int, dict[str, list[float]]] = {}
        measured = ((rung.time, record.name, rung) for record in records for rung in record.rungs)
        for _, name, rung in sorted(measured, key=lambda item: item[:2]):
            self._rungs.setdefault(rung.images, {})[name] = [rung.metrics[one] for one in self._metrics]

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """True if a trial ends at the rung at which it was just measured; see Ray Tune's Stopper."""
        if result["done"]:
            return False
        name, rung = self._names[trial_id], self._rungs.setdefault(result[IMAGES], {})
        rung.setdefault(name, [result[one] for one in self._metrics])
        *before, mine = list(rung.values())[: list(rung).index(name) + 1]
        if not before:
            return False
        if len(mine) == 1:
            return mine[0] > float(np.percentile(before, 100 / self._reduction))
        return bool(dominating(np.array(before), np.array(mine)).mean() > 1 / self._reduction)

    def stop_all(self) -> bool:
        """Always False; see Ray Tune's Stopper."""
        return False


def _key(parameters: dict[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset(parameters.items())


def _sampler(config: TuneConfig, seed: int) -> optuna.samplers.BaseSampler:
    if config.searcher == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    start = max(3, min(10, config.trials // 3))
    return optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=start,
        multivariate=True,
        constant_liar=True,
        warn_independent_sampling=False,
    )


def _told(record: Record, config: TuneConfig, space: Space) -> optuna.trial.FrozenTrial:
    known = all(name in record.metrics for name in config.metrics) and not record.lost
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if known else TrialState.FAIL,
        values=[record.metrics[name] for name in config.metrics] if known else None,
        params=record.parameters,
        distributions=space.entries,
    )
