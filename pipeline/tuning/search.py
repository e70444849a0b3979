"""A search with Ray Tune: every trial is a training run, judged by held-out bits/dim of its averaged weights.

The training loss is no objective: its scale depends on the schedule and on T. Bits/dim is the bound on the
likelihood of the same held-out images for every trial, with the same noise (common random numbers).
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from pipeline import tracking
from pipeline.config import DiffusionConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipeline.data.index import open_dataset
from pipeline.data.storage import absolute, check_writable
from pipeline.errors import InputError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import evaluate
from pipeline.training.trainer import check, train

OBJECTIVE = "bits_per_dim"
SEARCH_FOLDER = "search"


@dataclass(frozen=True)
class TuneConfig:
    """What is searched, and for how long each trial trains."""

    data: str
    """Dataset that jobs/prepare.py wrote, with a validation split (URI)."""
    output: str
    """Folder for the trials (all nodes must see it)."""
    trials: int = 12
    """Trials in all, whatever was done before a resume."""
    resume: bool = False
    """Go on with the search in --output; no finished trial is run again."""
    steps: int = 200
    """Optimizer steps of each trial."""
    workers: int = 1
    """Training workers of each trial."""
    batch_size: int = 128
    """Global batch size of each trial."""
    schedules: tuple[str, ...] = ("linear", "cosine", "sigmoid")
    """Noise schedules to choose from."""
    timesteps: tuple[int, ...] = (100, 200, 400)
    """Values of T to choose from."""
    learning_rate: tuple[float, float] = (3e-4, 3e-3)
    """Smallest and largest learning rate."""
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            model_channels=32, channel_multipliers=(1, 2), attention_resolutions=(4,)
        )
    )
    terms: int = 50
    """Terms of the bound that are evaluated, stratified over t; 0 = all T."""
    max_images: int = 128
    """Held-out images that every trial is judged on."""
    seed: int = 0
    """Seed of the search and of every trial's training."""
    experiment: str = "ray-ddpm"
    """MLflow experiment."""


def search(config: TuneConfig) -> dict[str, Any]:
    """Runs the search, or what is left of it.

    Raises:
        InputError: settings of which no trial could be run, an output that already holds a search.
    """
    if config.trials < 1:
        raise InputError(f"--trials must be at least 1, got {config.trials}")
    check_writable(config.output)
    # Trials run in folders of Ray's.
    config = replace(config, data=absolute(config.data), output=absolute(config.output))
    open_dataset(config.data, "validation")
    for schedule in config.schedules:
        check(
            trial_config(
                config, {"schedule": schedule, "timesteps": config.timesteps[0], "learning_rate": 1e-3}, ""
            )
        )
    output = Path(config.output)
    folder = output / SEARCH_FOLDER
    if folder.exists() and not config.resume:
        raise InputError(f"--output {config.output} already holds a search: pass --resume, or another folder")
    # The trial itself only waits for its workers, so it asks for next to no CPU: nothing can wait for what it holds.
    trainable = tune.with_resources(tune.with_parameters(run_trial, config=config), {"CPU": 0.01})
    if folder.exists() and tune.Tuner.can_restore(str(folder)):
        tuner = tune.Tuner.restore(str(folder), trainable, resume_unfinished=True, restart_errored=False)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=None,
            tune_config=tune.TuneConfig(
                metric=OBJECTIVE,
                mode="min",
                num_samples=config.trials,
                max_concurrent_trials=max(
                    1, int(ray.cluster_resources().get("CPU", 1)) // (2 * config.workers)
                ),
                search_alg=OptunaSearch(_space(config), metric=OBJECTIVE, mode="min", seed=config.seed),
            ),
            run_config=tune.RunConfig(name=SEARCH_FOLDER, storage_path=str(output), verbose=0),
        )
    results = tuner.fit()
    finished = [result for result in results if not result.error and OBJECTIVE in (result.metrics or {})]
    if not finished:
        raise InputError(
            f"no trial finished; the first one's reason: {' '.join(str(results[0].error).split())[-300:]}"
        )
    best = min(finished, key=lambda result: result.metrics[OBJECTIVE])
    rows = [
        {**r.config, OBJECTIVE: r.metrics[OBJECTIVE]}
        for r in sorted(finished, key=lambda r: r.metrics[OBJECTIVE])
    ]
    (output / "trials.json").write_text(json.dumps(rows, indent=1))
    metrics = {OBJECTIVE: best.metrics[OBJECTIVE], **best.config}
    return {
        "output": config.output,
        "model": best.metrics["model"],
        "metrics": metrics,
        "count": len(finished),
    }


def _space(config: TuneConfig) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return {
        "schedule": optuna.distributions.CategoricalDistribution(config.schedules),
        "timesteps": optuna.distributions.CategoricalDistribution(config.timesteps),
        "learning_rate": optuna.distributions.FloatDistribution(*config.learning_rate, log=True),
    }


def trial_config(config: TuneConfig, choice: dict[str, Any], output: str) -> TrainConfig:
    """The training run that a trial stands for."""
    return TrainConfig(
        data=config.data,
        output=output or config.output,
        steps=config.steps,
        workers=config.workers,
        batch_size=config.batch_size,
        seed=config.seed,
        resume=True,
        model=config.model,
        diffusion=DiffusionConfig(schedule=choice["schedule"], timesteps=int(choice["timesteps"])),
        optimizer=OptimizerConfig(learning_rate=float(choice["learning_rate"]), ema_decays=(0.99,)),
        experiment=config.experiment,
        checkpoint_every=max(config.steps // 2, 1),
        log_every=max(config.steps // 10, 1),
    )


def run_trial(choice: dict[str, Any], config: TuneConfig) -> None:
    """Trains, then measures; a restarted trial goes on from its own checkpoint."""
    output = Path(config.output) / "trials" / tune.get_context().get_trial_id()
    trained = train(replace(trial_config(config, choice, str(output)), run_name=output.name))
    measured = evaluate(
        EvaluateConfig(
            model=str(trained.folder),
            data=config.data,
            metrics=("bits",),
            terms=min(config.terms, int(choice["timesteps"])),
            max_images=config.max_images,
            seed=config.seed,
            actors=1,
        ),
        str(trained.folder),
    )
    tracking.end_run(trained.run)
    tune.report({OBJECTIVE: measured[OBJECTIVE], "model": str(trained.folder), "run_id": trained.run.id})
