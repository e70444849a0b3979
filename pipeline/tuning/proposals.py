"""Proposals: which trials a search runs, in which order, also after it was killed.

Optuna proposes through Ray Tune's OptunaSearch. What the ledger holds comes first: finished trials are told to
Optuna as they ended, unfinished ones are proposed again under their own number.
"""

from types import SimpleNamespace
from typing import Any

import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from pipeline.errors import InputError
from pipeline.tuning import ledger
from pipeline.tuning.config import TuneConfig, rung_images
from pipeline.tuning.ledger import Record
from pipeline.tuning.space import Space
from pipeline.tuning.trial import FAILED, IMAGES

_STUDY = "search"
# Random choices that are made until one is new; in a space that is used up none is.
ATTEMPTS = 500


class Proposals(Searcher):
    """Numbers the trials and writes them into the ledger as they are proposed."""

    def __init__(self, config: TuneConfig, space: Space, records: list[Record]) -> None:
        metrics = list(config.metrics)
        one = len(metrics) == 1
        super().__init__(metric=metrics[0] if one else metrics, mode="min" if one else ["min"] * len(metrics))
        self.names: dict[str, str] = {}
        self._asked: dict[str, str] = {}
        self._proposed = [record.parameters for record in records]
        self._config, self._space = config, space
        self._unfinished = [record for record in records if not record.over]
        self._next = max((record.number for record in records), default=-1) + 1
        storage = optuna.storages.InMemoryStorage()
        directions = ["minimize"] * len(metrics)
        study = optuna.create_study(storage=storage, study_name=_STUDY, directions=directions)
        for record in records:
            if record.over:
                study.add_trial(_told(record, config, space))
            else:
                study.enqueue_trial(record.parameters)
        self._study = study
        chance = optuna.samplers.RandomSampler(seed=config.seed * 100_003 + len(records) + 1)
        self._chance = optuna.create_study(sampler=chance)
        self._inner = OptunaSearch(
            space.entries,
            metric=self.metric,
            mode=self.mode,
            sampler=_sampler(config, len(records)),
            storage=storage,
            study_name=_STUDY,
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The flags of the next trial (see Ray Tune's Searcher)."""
        if self._unfinished:
            self._inner.suggest(trial_id)
            record = self._unfinished.pop(0)
        else:
            parameters = self._new_parameters(trial_id)
            if parameters is None:
                return Searcher.FINISHED
            record = Record(self._next, parameters, self._space.decode(parameters))
            self._next += 1
            ledger.write(self._config.output, record)
        self.names[trial_id] = record.name
        return dict(record.flags)

    def _new_parameters(self, trial_id: str) -> dict[str, Any] | None:
        """What no trial has had, since the same settings train to the same model; None where that is all there is.

        Optuna proposes the best it knows of again and again; then a random choice stands in for it.
        """
        if self._taken(parameters := self._inner.suggest(trial_id)):
            self._inner.on_trial_complete(trial_id, None, True)
            choices = (self._chance.ask(self._space.entries).params for _ in range(ATTEMPTS))
            parameters = next((choice for choice in choices if not self._taken(choice)), None)
            if parameters is None:
                return None
            self._study.enqueue_trial(parameters)
            self._asked[trial_id] = f"{trial_id}-again"
            self._inner.suggest(self._asked[trial_id])
        self._proposed.append(parameters)
        return parameters

    def _taken(self, parameters: dict[str, Any]) -> bool:
        return parameters in self._proposed

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Optuna is told the last result alone."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells Optuna how a trial ended."""
        failed = error or not result or bool(result.get(FAILED))
        self._inner.on_trial_complete(self._asked.get(trial_id, trial_id), None if failed else result, failed)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""


def make_scheduler(config: TuneConfig, space: Space, records: list[Record]) -> TrialScheduler | None:
    """Ray Tune's scheduler, with what an earlier start of the search measured.

    Raises:
        InputError: population based training of a space in which nothing can change under a half-trained model.
    """
    metric, rungs = config.metrics[0], rung_images(config)
    if config.scheduler == "none":
        return None
    if config.scheduler == "pbt":
        mutable = space.mutable()
        if not mutable:
            raise InputError(
                "--scheduler pbt needs a flag that can change under a half-trained model in the space, such as "
                "optimizer.learning_rate"
            )
        return _Population(
            time_attr=IMAGES,
            metric=metric,
            mode="min",
            perturbation_interval=rungs[0],
            hyperparam_mutations={name: _domain(entry) for name, entry in mutable.items()},
            custom_explore_fn=lambda flags: _inside(flags, space),
            quantile_fraction=0.25 if config.trials >= 4 else 0.5,
            log_config=False,
        )
    scheduler = ASHAScheduler(
        time_attr=IMAGES,
        metric=metric,
        mode="min",
        grace_period=rungs[0],
        max_t=rungs[-1],
        reduction_factor=config.reduction,
    )
    # Each rung's cut-off is one of all trials that reached it, whenever that was.
    seen = sorted(
        ((rung.time, record.name, rung) for record in records for rung in record.rungs),
        key=lambda item: item[:2],
    )
    for record in records:
        scheduler.on_trial_add(None, SimpleNamespace(trial_id=record.name))
    for _, name, rung in seen:
        result = {IMAGES: rung.images, metric: rung.metrics[metric]}
        scheduler.on_trial_result(None, SimpleNamespace(trial_id=name), result)
    return scheduler


class _Population(PopulationBasedTraining):
    """Ray Tune's, which refuses every searcher, since most would learn from flags that are changed behind their back.

    `Proposals` draws the whole population at random before anything is measured: it may.
    """

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)


def _sampler(config: TuneConfig, before: int) -> optuna.samplers.BaseSampler:
    # Seeded anew after a resume: the same random start would propose the first trials again.
    seed = config.seed * 100_003 + before
    if config.searcher == "random" or config.scheduler == "pbt":
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
    known = all(name in record.metrics for name in config.metrics) and record.status != "failed"
    state = optuna.trial.TrialState.COMPLETE if known else optuna.trial.TrialState.FAIL
    return optuna.trial.create_trial(
        state=state,
        values=[record.metrics[name] for name in config.metrics] if known else None,
        params=record.parameters,
        distributions=space.entries,
    )


def _domain(entry: optuna.distributions.BaseDistribution) -> Any:
    if isinstance(entry, optuna.distributions.CategoricalDistribution):
        import json

        return [json.loads(value) for value in entry.choices]
    low, high = entry.low, entry.high
    return tune.loguniform(low, high) if entry.log else tune.uniform(low, high)


def _inside(flags: dict[str, Any], space: Space) -> dict[str, Any]:
    """Perturbed numbers stay within the ranges of the space."""
    for name, entry in space.mutable().items():
        if not isinstance(entry, optuna.distributions.CategoricalDistribution):
            flags[name] = min(max(flags[name], entry.low), entry.high)
    return flags
