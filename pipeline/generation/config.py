"""Settings of a generation job."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pipeline.config import ModelSpec, Precision, SamplerName
from pipeline.errors import InputError
from pipeline.ranges import Finite, Natural, NotNegative, Positive, Range, Seed, Share, check_ranges

MOST_PNGS = 1_000_000
Format = Literal["parquet", "webdataset", "png", "npz"]


@dataclass(frozen=True)
class GenerateConfig:
    """What to sample from which model, and where it goes."""

    model: str = ""
    """Exported model folder, models:/NAME/VERSION or models:/NAME@ALIAS (pinned when the output is begun)."""
    output: str = ""
    """Folder for the dataset (URI; all nodes must see it)."""
    count: Positive = 64
    """Samples in all; raised later, it only adds."""
    batch_size: Annotated[int, Range(ge=1, le=65_536)] = 64
    """Samples computed together."""
    rows_per_file: Positive = 1024
    """Samples in one file, the unit that is written whole or not at all; a multiple of --batch-size."""
    sampler: SamplerName = "ancestral"
    """Sampler: ancestral (DDPM), ddim, dpm_solver (DPM-Solver++ 2M)."""
    sampling_steps: Natural = 0
    """Steps of the sampler; 0 = the model's T."""
    eta: Share = 0.0
    """Noise of DDIM: 0 deterministic, 1 as ancestral."""
    least_alpha_bar: Share = 0.0
    """Start at the noisiest step with at least this alpha_bar; 0 = at T. For ddim and dpm_solver, cosine schedule."""
    guidance: Finite = 1.0
    """Classifier-free guidance; 1 = none (class-conditional models only)."""
    labels: tuple[str, ...] = ()
    """Classes to sample, by name or number; empty = all (class-conditional models only)."""
    label_weights: tuple[NotNegative, ...] = ()
    """How often, relative to each other, those classes are drawn; empty = equally often."""
    seed: Seed = 0
    """Seed: sample i is a function of (model, sampler settings, seed, i)."""
    actors: Natural = 0
    """Sampler actors, exactly so many (short for equal --min-actors and --max-actors); 0 = as those two say."""
    min_actors: Positive = 1
    """Fewest actors of the pool, which grows while work waits and shrinks when it runs out."""
    max_actors: Natural = 0
    """Most actors of the pool; 0 = one for every CPU (or GPU) of the cluster, those included that an autoscaler adds."""
    gpu: bool = False
    """One GPU for each actor."""
    precision: Precision = "fp32"
    """Arithmetic of the network; auto = bf16 on GPU."""
    mixed_arithmetic: bool = False
    """Let CPUs and GPUs of several kinds make one dataset: each rounds otherwise, so some pixels differ a little."""
    compile: bool = False
    """Run the network through torch.compile (needs a C++ compiler where the actors run)."""
    format: Format = "parquet"
    """parquet (Hugging Face image convention), webdataset (tars), png (folders by label), npz (NumPy archives, and one of
    all samples that guided-diffusion's evaluator takes)."""
    max_blank_fraction: Share = 0.01
    """Share of images of one colour, or with numbers that are not finite, over which the job is refused."""
    verify: bool = False
    """Write nothing: check all that a reader of --output would open, and that a share of it comes out the same again.
    Settings and model are those of --output."""
    verify_share: Share = 0.05
    """The share of files that --verify generates again; at least one is."""

    @property
    def bf16(self) -> bool:
        """True if the network computes in bfloat16."""
        return self.precision == "bf16" or (self.precision == "auto" and self.gpu)


def check(config: GenerateConfig, spec: ModelSpec) -> None:
    """Checks that the settings fit each other and the model.

    Raises:
        InputError: they do not fit; the message says what to change.
    """
    from pipeline.diffusion.process import make_process  # parsing flags needs no torch

    check_ranges(config)
    if config.rows_per_file % config.batch_size:
        raise InputError(
            f"--rows-per-file {config.rows_per_file} is not a multiple of --batch-size {config.batch_size}"
        )
    if config.format == "png" and config.count > MOST_PNGS:
        raise InputError(
            f"--count {config.count} --format png: more than {MOST_PNGS:,} single files, which file systems and readers "
            "are slow with: use --format parquet or webdataset"
        )
    T = spec.diffusion.timesteps
    if config.sampling_steps > T:
        raise InputError(f"--sampling-steps {config.sampling_steps} is outside 1 to the model's T = {T}")
    usable = int((make_process(spec.diffusion).alpha_bar >= config.least_alpha_bar).sum())
    if usable < max(1, config.sampling_steps):
        raise InputError(
            f"--least-alpha-bar {config.least_alpha_bar:g} leaves {usable} of the model's {T} steps, fewer than "
            "--sampling-steps: lower it"
        )
    _check_actors(config)
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
                "--labels, --label-weights and --guidance need a class-conditional model, which this one is not"
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
            raise InputError(f"--labels {label}: the model has classes 0 to {len(names) - 1}: {some}")
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
