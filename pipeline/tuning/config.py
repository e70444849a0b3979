"""The settings of a search; imports neither torch nor Ray."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pipeline.config import Reading, TrainConfig
from pipeline.errors import InputError
from pipeline.evaluation.config import BITS_PER_DIM, FRECHET
from pipeline.ranges import (
    Cpus,
    GpuShare,
    MoreThanZero,
    Natural,
    Positive,
    Range,
    Seed,
    check_ranges,
    help_groups,
)

Scheduler = Literal["asha", "none"]
Searcher = Literal["tpe", "random"]

OBJECTIVES = {"bits": (BITS_PER_DIM,), "frechet": (FRECHET,), "both": (BITS_PER_DIM, FRECHET)}
LOSSES = ("loss", "mse", "training_mse", "training_loss", "train_loss")


@help_groups(
    trial="images", measurement="terms", hardware="concurrent", tracking="experiment", dataset="split"
)
@dataclass(frozen=True)
class TuneConfig:
    """The settings of a search: data, search space, objective and length of the trials."""

    data: str
    """Dataset with held-out images: a folder that the prepare job wrote, or raw images that it reads (URI)."""
    output: str
    """Folder for the trials and the report. All nodes must see it."""
    trials: Positive = 12
    """Trials in all, those before a resume included."""
    space: str = ""
    """YAML file with the search space, over any flag of the train job. Empty = pipeline/tuning/space.yaml, fitted to the
    size and the classes of the data."""
    objective: str = "bits"
    """What trials are compared by: bits (held-out bits/dim), frechet (distance of samples to the data), both."""
    searcher: Searcher = "tpe"
    """How the next trial's settings are chosen: tpe (Optuna's TPE) or random."""
    scheduler: Scheduler = "asha"
    """asha stops weak trials early, by both figures if there are two; none trains every trial to its end."""
    resume: bool = False
    """Continue the search in --output, even if it was moved or copied. Finished trials are not repeated."""
    seed: Seed = 0
    """Seed of the search, of every trial's training and of every measurement."""
    register: str = "tuned"
    """Register the best trial's model in MLflow under this name; empty = do not register."""
    images: Positive = 40_960
    """Training images that a trial sees if nothing stops it, rounded to whole batches."""
    rungs: Annotated[int, Range(ge=1, le=40)] = 3
    """Measurements per trial, the last at its end."""
    reduction: Annotated[int, Range(ge=2)] = 3
    """Factor of asha: at each rung one trial in so many goes on, and sees so many times the images."""
    terms: Natural = 32
    """Terms of the bound per held-out image, stratified over t; an even number; 0 = all T."""
    decoder: Literal["softmax", "own"] = "softmax"
    """L_0 of the bound: softmax (over the pixel values that occur, the same for all trials), or each model's own
    discretized Gaussian, whose width depends on the schedule."""
    max_images: Natural = 256
    """Held-out images to judge every trial on; 0 = all."""
    samples: Annotated[int, Range(ge=2)] = 512
    """Samples per measurement of the Fréchet distance."""
    sampling_steps: Positive = 25
    """Steps of DDIM for each of those samples."""
    features: str = "classifier"
    """Features of the Fréchet distance; see `ray-ddpm evaluate --help`."""
    concurrent: Positive = 64
    """Most trials at a time, limited by what fits the cluster with the nodes that its autoscaler can add."""
    workers: Positive = 1
    """Training workers per trial."""
    cpus_per_worker: Cpus = 1.0
    """CPUs that each worker reserves. A fraction lets more trials run at a time."""
    gpus_per_worker: GpuShare = 1.0
    """GPUs that each worker reserves when training on GPUs. A fraction lets several trials share a GPU."""
    cache_dir: str = ""
    """Folder on each node's own disk that caches remote data for all trials; empty = no cache."""
    cache_gb: MoreThanZero = 100.0
    """Size limit of that cache, in gigabytes per node."""
    experiment: str = "ray-ddpm"
    """Name of the MLflow experiment."""
    alias: str = "best"
    """Alias that points to the registered version."""
    split: tuple[str, ...] = ()
    """Splits of raw data to use. Empty = all, but without the test split if there is a validation split."""
    reading: Reading = field(default_factory=Reading)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics to minimise. The first one decides if only one can."""
        return OBJECTIVES[self.objective]


def check(config: TuneConfig) -> None:
    """Checks the settings.

    Raises:
        InputError: names the wrong setting.
    """
    if config.objective.lower().replace("-", "_") in LOSSES:
        raise InputError(
            f"--objective {config.objective}: the training loss can't compare trials, because its scale depends "
            "on the schedule, on T and on the kind of loss, so a schedule that makes denoising easy would win: use bits, "
            "frechet or both"
        )
    if config.objective not in OBJECTIVES:
        raise InputError(f"--objective {config.objective!r} is not one of {', '.join(OBJECTIVES)}")
    check_ranges(config)
    if config.images < config.reduction ** (config.rungs - 1):
        least = config.reduction ** (config.rungs - 1)
        raise InputError(
            f"--images {config.images} is too small for --rungs {config.rungs}: give at least {least}, or fewer --rungs"
        )
    if config.max_images == 1:
        raise InputError("--max-images 1: a standard error needs two images: give at least 2, or 0 for all")
    if config.terms % 2:
        raise InputError(
            f"--terms {config.terms} must be even: give {config.terms - 1} or {config.terms + 1}; 0 = all terms"
        )


def rung_images(config: TuneConfig) -> list[int]:
    """Images seen at each rung, ascending: a geometric series that ends at `images`."""
    first = -(-config.images // config.reduction ** (config.rungs - 1))
    return [first * config.reduction**k for k in range(config.rungs - 1)] + [config.images]


def rung_steps(config: TuneConfig, batch_size: int) -> dict[int, int]:
    """The rungs for a batch size, each rounded to whole batches.

    Returns:
        the images of each rung, by its optimizer steps.

    Raises:
        InputError: two rungs have the same number of batches.
    """
    steps = {max(1, round(images / batch_size)): images for images in rung_images(config)}
    if len(steps) < config.rungs:
        raise InputError(
            f"--batch-size {batch_size} is too large to tell the rungs at {', '.join(map(str, rung_images(config)))} "
            "images apart: give more --images, or fewer --rungs"
        )
    return steps


def base(config: TuneConfig) -> TrainConfig:
    """The settings that all trials share, without the flags of the space."""
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
    """A trial's training run with the number of steps that its batch size requires.

    Args:
        trial: the trial's settings.
        changes: other settings to replace.
    """
    steps = list(rung_steps(config, trial.batch_size))
    return replace(
        trial, steps=steps[-1], checkpoint_every=steps[0], log_every=max(1, steps[-1] // 20), **changes
    )
