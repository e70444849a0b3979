"""Checks of a training run before it uses a cluster or claims an output."""

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
    """The model that a configuration and a dataset define, with its provenance."""
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
    """Checks everything that can be checked before a cluster is needed.

    Args:
        data: the dataset that `config.data` names, if it is already open.

    Returns:
        the dataset, and the model to train.

    Raises:
        InputError: says in one line what to change.
    """
    check_settings(config)
    check_apart(config.output, "--data", config.data)
    data = data or open_splits(config.data, config.image_size, config.reading, config.split, config.output)
    spec = check_fit(config, data)
    storage.check_writable(config.output)
    return data, spec


def check_settings(config: TrainConfig) -> None:
    """Checks the settings that do not depend on the data.

    Raises:
        InputError: names the wrong setting.
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
            f"--gpus-per-worker {config.gpus_per_worker:g} with --workers {config.workers}: NCCL can't connect two "
            "workers on one GPU: give --gpus-per-worker 1, or --workers 1"
        )
    if not config.optimizer.ema_decays:
        raise InputError("--ema-decays needs at least one value: the first average is the exported model")
    if config.cache_dir and not storage.is_local(config.cache_dir):
        raise InputError(f"--cache-dir {config.cache_dir} must be a folder on the nodes' own disks")
    check_loss(config.diffusion)
    make_betas(resolve(config.diffusion))


def check_length(config: TrainConfig, rows: int) -> None:
    """Checks the batch size and the number of steps against the number of images.

    Args:
        rows: images to train on.

    Raises:
        InputError: names the setting that is too large.
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
    """Checks the settings against the data.

    Returns:
        the model to train.

    Raises:
        InputError: names the setting that does not fit.
    """
    check_length(config, data["train"].rows)
    spec = make_spec(config, data["train"])
    check_model(spec.model, spec.image)
    if config.validate_every:
        _check_validation(config, spec, data["validation"].rows)
    return spec


def _check_validation(config: TrainConfig, spec: ModelSpec, held_out: int) -> None:
    if held_out < 2 or config.validation_images == 1:
        raise InputError(
            "--validate-every needs at least two held-out images: give data with a validation split, or a larger "
            "--validation-images"
        )
    if config.validation_terms % 2 and config.validation_terms < spec.diffusion.timesteps:
        raise InputError(
            f"--validation-terms {config.validation_terms} must be even: give {config.validation_terms - 1} or "
            f"{config.validation_terms + 1}; 0 = all terms"
        )
    metrics, features = set(config.validate_metrics), config.validation_features
    if "bits" not in metrics:
        raise InputError(
            "--validate-metrics needs bits: the checkpoint with the lowest bits/dim is the best one"
        )
    if "cas" in metrics and not spec.model.class_conditional:
        raise InputError("--validate-metrics cas needs --class-conditional, for samples of known classes")
    if not metrics - {"bits", "cas"}:
        return
    if features != "classifier":
        from pipeline.evaluation.features import open_extractor

        open_extractor(features, spec.image, "--validation-features")
    elif len(spec.image.classes) < 2:
        raise InputError(
            "--validate-metrics: a classifier needs at least two classes: give --validation-features FILE"
        )
