"""Settings of a generation job."""

import difflib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pipeline.config import ModelSpec, Precision, SamplerName
from pipeline.errors import InputError
from pipeline.ranges import (
    Finite,
    Natural,
    NotNegative,
    Positive,
    Range,
    Seed,
    Share,
    check_ranges,
    help_groups,
)

MOST_PNGS = 1_000_000
Format = Literal["parquet", "webdataset", "png", "npz"]


@help_groups(classes="guidance", dataset="format", hardware="actors", verification="verify")
@dataclass(frozen=True)
class GenerateConfig:
    """What to sample from which model, and where it goes."""

    model: str = ""
    """Exported model folder, models:/NAME/VERSION or models:/NAME@ALIAS. An alias is resolved once, when the output is
    begun."""
    output: str = ""
    """Folder for the dataset (URI). All nodes must see it."""
    count: Positive = 64
    """Samples in all. A larger count on the same output only adds samples."""
    sampler: SamplerName = "ancestral"
    """Sampler: ancestral (DDPM), ddim, or dpm_solver (DPM-Solver++ 2M)."""
    sampling_steps: Natural = 0
    """Steps of the sampler, at most the model's T; 0 = T."""
    eta: Share = 0.0
    """Noise of the ddim sampler: 0 = deterministic, 1 = as much as ancestral sampling."""
    least_alpha_bar: Share = 0.0
    """Start sampling at the noisiest step with at least this alpha_bar; 0 = at T. On a cosine
    schedule it helps ddim and dpm_solver with colour images."""
    batch_size: Annotated[int, Range(ge=1, le=65_536)] = 64
    """Samples per forward pass."""
    seed: Seed = 0
    """Seed of the noise. Sample i depends on the model, the sampler's settings, the seed and i alone."""
    guidance: Finite = 1.0
    """Scale of classifier-free guidance; 1 = none (class-conditional models only)."""
    labels: tuple[str, ...] = ()
    """Classes to sample, by name or number; empty = all (class-conditional models only)."""
    label_weights: tuple[NotNegative, ...] = ()
    """Relative frequency of each of those classes; empty = equal."""
    format: Format = "parquet"
    """Format of the dataset: parquet (Hugging Face image convention), webdataset (tars), png (one folder per label), npz
    (NumPy archives, and one of all samples for guided-diffusion's evaluator)."""
    rows_per_file: Positive = 1024
    """Samples per file, a multiple of --batch-size. A file appears whole or not at all."""
    max_blank_fraction: Share = 0.01
    """Share of samples that are of one colour or not finite, above which the job stops."""
    actors: Natural = 0
    """Sampler processes; short for equal --min-actors and --max-actors. 0 = use those two."""
    min_actors: Positive = 1
    """Fewest sampler processes. The pool grows while work waits and shrinks when none is left."""
    max_actors: Natural = 0
    """Most sampler processes; 0 = one per CPU (or GPU) that the cluster has or its autoscaler can add."""
    gpu: bool = False
    """Sample on GPUs, one per process."""
    precision: Precision = "fp32"
    """Arithmetic of the network; auto = bf16 on a GPU, else fp32."""
    mixed_arithmetic: bool = False
    """Allow CPUs or GPUs of several kinds to make one dataset. They round differently, so a few pixels differ."""
    compile: bool = False
    """Compile the network with torch.compile; needs a C++ compiler on every node."""
    verify: bool = False
    """Write nothing. Check every file of --output as a reader would, and generate a share of the files again to compare.
    Model and settings come from --output."""
    verify_share: Share = 0.05
    """Share of the files that --verify generates again, at least one."""

    @property
    def bf16(self) -> bool:
        """True if the network computes in bfloat16."""
        return self.precision == "bf16" or (self.precision == "auto" and self.gpu)


def check_settings(config: GenerateConfig) -> None:
    """Checks that the settings fit each other.

    Raises:
        InputError: they do not fit; the message says what to change.
    """
    check_ranges(config)
    _check_actors(config)
    if config.rows_per_file % config.batch_size:
        below = config.rows_per_file // config.batch_size * config.batch_size
        near = f"{below} or {below + config.batch_size}" if below else f"{config.batch_size}"
        raise InputError(
            f"--rows-per-file {config.rows_per_file} is not a multiple of --batch-size {config.batch_size}: give {near}"
        )
    if config.format == "png" and config.count > MOST_PNGS:
        raise InputError(
            f"--count {config.count} --format png: more than {MOST_PNGS:,} single files, which file systems and readers "
            "are slow with: use --format parquet or webdataset"
        )


def check(config: GenerateConfig, spec: ModelSpec) -> None:
    """Checks that the settings fit each other and the model.

    Raises:
        InputError: they do not fit; the message says what to change.
    """
    from pipeline.diffusion.process import make_process  # parsing flags needs no torch

    check_settings(config)
    T = spec.diffusion.timesteps
    if config.sampling_steps > T:
        raise InputError(
            f"--sampling-steps {config.sampling_steps} is more than the model's T = {T}: give 1 to {T}, or 0 for {T}"
        )
    usable = int((make_process(spec.diffusion).alpha_bar >= config.least_alpha_bar).sum())
    if usable < max(1, config.sampling_steps):
        raise InputError(
            f"--least-alpha-bar {config.least_alpha_bar:g} leaves {usable} of the model's {T} steps, fewer than "
            "--sampling-steps: lower it"
        )
    _check_labels(config, spec)


def _check_actors(config: GenerateConfig) -> None:
    if config.actors and (config.min_actors > 1 or config.max_actors):
        raise InputError(
            "--actors is a fixed number: leave it out where --min-actors or --max-actors is given"
        )
    if 0 < config.max_actors < config.min_actors:
        raise InputError(f"--max-actors {config.max_actors} is less than --min-actors {config.min_actors}")


def _check_labels(config: GenerateConfig, spec: ModelSpec) -> None:
    classes = len(spec.image.classes)
    if not spec.model.class_conditional:
        if config.labels or config.label_weights or config.guidance != 1:
            raise InputError(
                "--labels, --label-weights and --guidance need a class-conditional model, which this one is not: leave "
                "them out, or train one with --class-conditional"
            )
        return
    label_numbers(config, spec)
    weights, wanted = config.label_weights, len(config.labels) or classes
    if weights and len(weights) != wanted:
        raise InputError(f"--label-weights gives {len(weights)} weights for {wanted} classes")
    if weights and not 0 < sum(weights) < float("inf"):
        raise InputError("--label-weights: their sum must be a finite number, and not 0")


def label_numbers(config: GenerateConfig, spec: ModelSpec) -> list[int]:
    """The class numbers to sample; empty = all.

    Raises:
        InputError: the model has no such class.
    """
    names, numbers = spec.image.classes, list[int]()
    for label in map(str, config.labels):
        if label in names:
            numbers.append(names.index(label))
        elif label.isdecimal() and int(label) < len(names):
            numbers.append(int(label))
        else:
            some = ", ".join(names[:5]) + ", …" * (len(names) > 5)
            near = difflib.get_close_matches(label, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(f"--labels {label}: the model has classes 0 to {len(names) - 1}: {some}{hint}")
    return numbers


def identity(config: GenerateConfig, spec: ModelSpec, fingerprint: str) -> dict[str, Any]:
    """All settings that decide the bytes of the dataset."""
    return {
        "model_fingerprint": fingerprint,
        "sampler": config.sampler,
        "sampling_steps": config.sampling_steps or spec.diffusion.timesteps,
        "eta": config.eta,
        "least_alpha_bar": config.least_alpha_bar,
        "guidance": config.guidance,
        "labels": label_numbers(config, spec),
        "label_weights": list(config.label_weights),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "rows_per_file": config.rows_per_file,
        "device": "gpu" if config.gpu else "cpu",
        "precision": "bf16" if config.bf16 else "fp32",
        "compile": config.compile,
        "format": config.format,
    }
