"""What is refused of a training run before a cluster is asked for anything, or an output is claimed."""

from pipeline import __version__, storage
from pipeline.config import ModelSpec, TrainConfig
from pipeline.data.index import DatasetIndex, Splits, open_splits
from pipeline.diffusion.losses import check_loss
from pipeline.diffusion.schedules import make_betas, resolve
from pipeline.errors import InputError
from pipeline.models.unet import check_model
from pipeline.output import check_apart
from pipeline.ranges import check_ranges
from pipeline.rng import EPOCHS


def make_spec(config: TrainConfig, index: DatasetIndex) -> ModelSpec:
    """The model that a configuration and a dataset call for, with where it came from."""
    return ModelSpec(
        model=config.model,
        image=index.image,
        diffusion=resolve(config.diffusion),
        provenance={
            "ray_ddpm": __version__,
            "data": storage.title(config.data),
            "data_fingerprint": index.fingerprint,
            "data_rows": index.rows,
            "steps": config.steps,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "ema_decay": config.optimizer.ema_decays[0],
        },
    )


def check(config: TrainConfig, data: Splits | None = None) -> tuple[Splits, ModelSpec]:
    """Everything that can be known to be wrong before a cluster is asked for anything.

    Args:
        data: what `config.data` names, where it is open already.

    Returns:
        the data, and the model to train.

    Raises:
        InputError: in one line, what to change.
    """
    check_settings(config)
    check_apart(config.output, "--data", config.data)
    data = data or open_splits(config.data, config.image_size, config.reading, config.split, config.output)
    spec = check_fit(config, data)
    storage.check_writable(config.output)
    return data, spec


def check_settings(config: TrainConfig) -> None:
    """Whether the settings make sense, on any data.

    Raises:
        InputError: names the one that doesn't.
    """
    check_ranges(config)
    if config.min_workers > config.workers:
        raise InputError(
            f"--min-workers {config.min_workers} is more than --workers {config.workers}: give at most {config.workers}"
        )
    if config.batch_size < config.workers:
        raise InputError(
            f"--batch-size {config.batch_size} is the global batch and is split over --workers {config.workers}: "
            f"give at least {config.workers}"
        )
    if config.gpus_per_worker < 1 and config.workers > 1:
        raise InputError(
            f"--gpus-per-worker {config.gpus_per_worker:g} with --workers {config.workers}: NCCL joins no two workers on "
            "one GPU: give 1, or --workers 1"
        )
    if not config.optimizer.ema_decays:
        raise InputError(
            "--ema-decays needs at least one value: the first average is the model that is exported"
        )
    if config.cache_dir and not storage.is_local(config.cache_dir):
        raise InputError(f"--cache-dir {config.cache_dir} must be a folder on the nodes' own disks")
    check_loss(config.diffusion)


def check_length(config: TrainConfig, rows: int) -> None:
    """Whether a batch, and all steps, fit so many images.

    Raises:
        InputError: names the setting that doesn't.
    """
    if config.batch_size > rows:
        raise InputError(
            f"--batch-size {config.batch_size} is more than the {rows} images to train on: give at most {rows}"
        )
    if config.steps * config.batch_size > EPOCHS * rows:
        raise InputError(
            f"--steps {config.steps} are more than {EPOCHS} epochs of {rows} images: give at most "
            f"{EPOCHS * rows // config.batch_size}"
        )


def check_fit(config: TrainConfig, data: Splits) -> ModelSpec:
    """Whether the settings fit the data.

    Returns:
        the model to train.

    Raises:
        InputError: names the setting that doesn't.
    """
    check_length(config, data["train"].rows)
    spec = make_spec(config, data["train"])
    make_betas(spec.diffusion)
    check_model(spec.model, spec.image)
    if config.validate_every:
        _check_validation(config, spec, data["validation"].rows)
    return spec


def _check_validation(config: TrainConfig, spec: ModelSpec, held_out: int) -> None:
    if held_out < 2 or config.validation_images == 1:
        raise InputError("--validate-every needs at least two held-out images")
    if config.validation_terms % 2 and config.validation_terms < spec.diffusion.timesteps:
        raise InputError(
            f"--validation-terms {config.validation_terms} must be even: give {config.validation_terms - 1} or "
            f"{config.validation_terms + 1}; 0 = all terms"
        )
    metrics, features = set(config.validate_metrics), config.validation_features
    if "bits" not in metrics:
        raise InputError("--validate-metrics needs bits: the best checkpoint is the one of the lowest")
    if "cas" in metrics and not spec.model.class_conditional:
        raise InputError("--validate-metrics cas needs --class-conditional: samples of known classes")
    if not metrics - {"bits", "cas"}:
        return
    if features != "classifier":
        from pipeline.evaluation.features import open_extractor

        open_extractor(features, spec.image, "--validation-features")
    elif len(spec.image.classes) < 2:
        raise InputError(
            "--validate-metrics: no classifier can be trained without two classes: give --validation-features FILE"
        )
