"""Settings of a generation job."""

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import ModelSpec, Precision, SamplerName
from pipeline.errors import InputError

Format = Literal["parquet", "webdataset", "png"]


@dataclass(frozen=True)
class GenerateConfig:
    """What to sample from which model, and where it goes."""

    model: str
    """Exported model folder, models:/NAME/VERSION or models:/NAME@ALIAS."""
    output: str
    """Folder for the dataset (URI; all nodes must see it)."""
    count: int = 64
    """Samples in all; raised later, it only adds."""
    batch_size: int = 64
    """Samples computed together."""
    rows_per_file: int = 1024
    """Samples in one file, the unit that is written whole or not at all; a multiple of --batch-size."""
    sampler: SamplerName = "ancestral"
    """Sampler: ancestral (DDPM), ddim, dpm_solver (DPM-Solver++ 2M)."""
    sampling_steps: int = 0
    """Steps of the sampler; 0 = the model's T."""
    eta: float = 0.0
    """Noise of DDIM: 0 deterministic, 1 as ancestral."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 = none (class-conditional models only)."""
    labels: tuple[int, ...] = ()
    """Classes to sample, equally likely; empty = all (class-conditional models only)."""
    seed: int = 0
    """Seed: sample i is a function of (model, sampler settings, seed, i)."""
    actors: int = 0
    """Most sampler actors; 0 = one for every CPU (or GPU) of the cluster."""
    min_actors: int = 1
    """Actors to start with; Ray Data adds more up to --actors while work waits."""
    gpu: bool = False
    """One GPU for each actor."""
    precision: Precision = "fp32"
    """Arithmetic of the network; auto = bf16 on GPU."""
    format: Format = "parquet"
    """parquet (Hugging Face image convention), webdataset (tars), png (folders by label)."""
    max_blank_fraction: float = 0.01
    """Share of blank or non-finite images at which the job stops."""


def check(config: GenerateConfig, spec: ModelSpec) -> None:
    """Whether the settings fit each other and the model.

    Raises:
        InputError: in one line, what to change.
    """
    for name in ("count", "batch_size", "rows_per_file", "min_actors"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if config.rows_per_file % config.batch_size:
        raise InputError(
            f"--rows-per-file {config.rows_per_file} is not a multiple of --batch-size {config.batch_size}"
        )
    T = spec.diffusion.timesteps
    if not 0 <= config.sampling_steps <= T:
        raise InputError(f"--sampling-steps {config.sampling_steps} is outside 1 to the model's T = {T}")
    if not 0 <= config.eta <= 1:
        raise InputError(f"--eta {config.eta} is outside 0 to 1")
    if not spec.model.class_conditional and (config.labels or config.guidance != 1):
        raise InputError("--labels and --guidance need a class-conditional model, which this one is not")
    if unknown := [label for label in config.labels if not 0 <= label < len(spec.image.classes)]:
        raise InputError(f"--labels {unknown[0]}: the model has classes 0 to {len(spec.image.classes) - 1}")


def identity(config: GenerateConfig, spec: ModelSpec, fingerprint: str) -> dict[str, Any]:
    """Everything that decides the bytes of the dataset."""
    return {
        "model_fingerprint": fingerprint,
        "sampler": config.sampler,
        "sampling_steps": config.sampling_steps or spec.diffusion.timesteps,
        "eta": config.eta,
        "guidance": config.guidance,
        "labels": list(config.labels),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "rows_per_file": config.rows_per_file,
        "precision": config.precision,
        "format": config.format,
    }
