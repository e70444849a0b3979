"""The settings of a search; imports neither torch nor Ray."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pipeline.config import Reading, TrainConfig
from pipeline.errors import InputError
from pipeline.evaluation.config import BITS_PER_DIM, FRECHET
from pipeline.ranges import Cpus, GpuShare, MoreThanZero, Natural, Positive, Range, Seed, check_ranges

Scheduler = Literal["asha", "none"]
Searcher = Literal["tpe", "random"]

OBJECTIVES = {"bits": (BITS_PER_DIM,), "frechet": (FRECHET,), "both": (BITS_PER_DIM, FRECHET)}
LOSSES = ("loss", "mse", "training_mse", "training_loss", "train_loss")


@dataclass(frozen=True)
class TuneConfig:
    """What is searched, what it is judged by, and for how long each trial trains."""

    data: str
    """Dataset with held-out images: a folder that jobs/prepare.py wrote, or any of the formats that it reads (URI)."""
    output: str
    """Folder for the trials and the report (all nodes must see it)."""
    trials: Positive = 12
    """Trials in all, whatever was done before a resume."""
    resume: bool = False
    """Go on with the search in --output, also where it was moved or copied to; no finished trial is run again."""
    space: str = ""
    """YAML file of the search space, any flag of jobs/train.py; empty = pipeline/tuning/space.yaml."""
    objective: str = "bits"
    """bits (held-out bits/dim), frechet (distance of samples to the data), both (a Pareto front)."""
    searcher: Searcher = "tpe"
    """How trials are chosen: Optuna's TPE, or at random."""
    scheduler: Scheduler = "asha"
    """asha stops weak trials at rungs, by both figures where there are two; none trains every trial to its end."""
    images: Positive = 40_960
    """Images that a trial sees in training, if it isn't stopped; brought to the nearest whole batch, as each rung is."""
    rungs: Annotated[int, Range(ge=1, le=40)] = 3
    """Measurements of a trial, the last one at its end."""
    reduction: Annotated[int, Range(ge=2)] = 3
    """asha keeps one of so many trials at each rung, and each rung is so many times the images of the one before."""
    concurrent: Positive = 64
    """Most trials at a time; never more than fit the cluster, with the nodes that its autoscaler can add."""
    workers: Positive = 1
    """Training workers of each trial."""
    cpus_per_worker: Cpus = 1.0
    """CPUs that each worker reserves; fractions let more trials run at a time."""
    gpus_per_worker: GpuShare = 1.0
    """GPUs that each worker reserves where trials train on GPUs; with a fraction several trials share one."""
    cache_dir: str = ""
    """Folder on each node's own disk that keeps what trials read of remote data, for all of them; empty = none."""
    cache_gb: MoreThanZero = 100.0
    """Most gigabytes that it holds."""
    terms: Natural = 32
    """Terms of the bound evaluated for each held-out image, stratified over t; an even number; 0 = all T."""
    decoder: Literal["softmax", "own"] = "softmax"
    """L_0 of the bound: softmax over the values that occur, without parameters and so the same for all trials, or each
    model's own discretized Gaussian, whose width depends on the schedule."""
    max_images: Natural = 256
    """Held-out images that every trial is judged on; 0 = all."""
    samples: Annotated[int, Range(ge=2)] = 512
    """Samples of the Fréchet distance."""
    sampling_steps: Positive = 25
    """Model evaluations for each of those samples (DDIM), the same for every trial."""
    features: str = "classifier"
    """Features of the Fréchet distance: see jobs/evaluate.py --features."""
    seed: Seed = 0
    """Seed of the search, of every trial's training and of every measurement."""
    experiment: str = "ray-ddpm"
    """MLflow experiment."""
    register: str = "tuned"
    """Name under which the winner is registered in MLflow; empty = not registered."""
    alias: str = "best"
    """Alias that is pointed at the registered version."""
    reading: Reading = field(default_factory=Reading)
    split: tuple[str, ...] = ()
    """The own splits of raw data to use; all, but a test split is left alone where there is a validation split."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is minimised; the first one decides where only one can."""
        return OBJECTIVES[self.objective]


def check(config: TuneConfig) -> None:
    """Whether the settings make sense.

    Raises:
        InputError: names the one that doesn't.
    """
    if config.objective.lower().replace("-", "_") in LOSSES:
        raise InputError(
            f"--objective {config.objective}: the training loss can't compare trials, since its scale depends on "
            "the schedule, on T and on the kind of loss: a schedule that makes denoising easy would win; use bits, "
            "frechet or both"
        )
    if config.objective not in OBJECTIVES:
        raise InputError(f"--objective {config.objective!r} is not one of {', '.join(OBJECTIVES)}")
    check_ranges(config)
    if config.images < config.reduction ** (config.rungs - 1):
        raise InputError(f"--images {config.images} are too few for --rungs {config.rungs}")
    if config.max_images == 1:
        raise InputError("--max-images 1: a standard error needs at least two images")
    if config.terms % 2:
        raise InputError(f"--terms {config.terms}: give an even number, or 0 for all terms of the bound")


def rung_images(config: TuneConfig) -> list[int]:
    """Images seen at each rung, ascending: a geometric series that ends at `images`."""
    first = -(-config.images // config.reduction ** (config.rungs - 1))
    return [first * config.reduction**k for k in range(config.rungs - 1)] + [config.images]


def rung_steps(config: TuneConfig, batch_size: int) -> dict[int, int]:
    """From optimizer steps to the rung's images, for a batch size: each rung is brought to the nearest whole batch.

    Raises:
        InputError: two rungs are the same number of batches.
    """
    steps = {max(1, round(images / batch_size)): images for images in rung_images(config)}
    if len(steps) < config.rungs:
        raise InputError(
            f"--batch-size {batch_size} is too large to tell the rungs at {', '.join(map(str, rung_images(config)))} "
            "images apart: give more --images, or fewer --rungs"
        )
    return steps


def base(config: TuneConfig) -> TrainConfig:
    """What all trials have in common, before the space's own flags."""
    return TrainConfig(
        data=config.data,
        output=config.output,
        reading=config.reading,
        split=config.split,
        workers=config.workers,
        cpus_per_worker=config.cpus_per_worker,
        gpus_per_worker=config.gpus_per_worker,
        cache_dir=config.cache_dir,
        cache_gb=config.cache_gb,
        seed=config.seed,
        resume=True,
        keep_checkpoints=2,
        max_failures=3,
        experiment=config.experiment,
    )


def finished(config: TuneConfig, trial: TrainConfig, **changes: Any) -> TrainConfig:
    """A trial's training run with the steps that its batch size calls for."""
    steps = list(rung_steps(config, trial.batch_size))
    return replace(
        trial, steps=steps[-1], checkpoint_every=steps[0], log_every=max(1, steps[-1] // 20), **changes
    )
