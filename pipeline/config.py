"""Every setting of the project, as frozen dataclasses.

The field docstrings are the jobs' `--help`; the defaults are the flags' defaults. Nothing here imports
torch or Ray: a configuration can be read, checked and written anywhere.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from pipeline.errors import InputError
from pipeline.ranges import (
    Cpus,
    Finite,
    GpuShare,
    MoreThanZero,
    Natural,
    NotNegative,
    Positive,
    Range,
    Seed,
    Share,
)

Variance = Literal["fixed_large", "fixed_small", "learned_range"]
LossKind = Literal["simple", "weighted", "vlb", "hybrid", "min_snr"]
TimestepSampler = Literal["uniform", "loss_second_moment"]
SamplerName = Literal["ancestral", "ddim", "dpm_solver"]
Precision = Literal["auto", "fp32", "bf16"]
ValidationMetric = Literal["bits", "frechet", "kernel", "precision_recall", "cas"]
EmaDevice = Literal["worker", "cpu"]
Source = Literal[
    "auto", "digits", "idx", "cifar", "npz", "folder", "zip", "webdataset", "huggingface", "arrow"
]


# Names of checkpoints have room for nine digits.
Steps = Annotated[int, Range(ge=1, le=10**9 - 1)]
ImageSize = Annotated[int, Range(ge=0, le=16_384)]
Decay = Annotated[float, Range(ge=0, lt=1)]
EmaLength = Annotated[float, Range(ge=0.0001, le=0.28)]


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and the loss (Ho et al. 2020; Nichol & Dhariwal 2021)."""

    schedule: str = "cosine"
    """Noise schedule: linear, quadratic, cosine, sigmoid, constant, log_snr, or the path of a file with betas."""
    timesteps: Annotated[int, Range(ge=1, le=10_000)] = 1000
    """T, the number of diffusion steps."""
    beta_start: Annotated[float, Range(gt=0, lt=1)] = 1e-4
    """First beta of linear and quadratic at T = 1000; other T rescale it."""
    beta_end: Annotated[float, Range(gt=0, lt=1)] = 0.02
    """Last beta of linear and quadratic at T = 1000; other T rescale it."""
    cosine_offset: MoreThanZero = 0.008
    """s of the cosine schedule: keeps the first betas from being too small."""
    sigmoid_temperature: MoreThanZero = 1.0
    """Temperature of the sigmoid schedule: lower ones fall more steeply in the middle."""
    log_snr_first: Annotated[float, Range(ge=0, le=30)] = 10.0
    """log(alpha_bar / (1 - alpha_bar)) of the first step of the log_snr schedule."""
    log_snr_last: Annotated[float, Range(ge=-30, le=0)] = -10.0
    """The same of the last step."""
    variance: Variance = "fixed_large"
    """Reverse-process variance: beta, beta-tilde, or learned between the two in log space."""
    loss: LossKind = "simple"
    """Training objective: L_simple, the weighted L_t, L_vlb, L_hybrid, or min-SNR weighted L_simple."""
    timestep_sampler: TimestepSampler = "uniform"
    """How t is drawn in training."""
    vlb_weight: NotNegative = 0.001
    """Weight of L_vlb in L_hybrid (lambda of Improved DDPM, equation 16)."""
    min_snr_gamma: MoreThanZero = 5.0
    """Gamma of the min-SNR weighting (Hang et al. 2023)."""
    betas: tuple[Finite, ...] = ()
    """The betas themselves, in order; filled in from the file that --schedule names. Leave empty."""


@dataclass(frozen=True)
class ModelConfig:
    """The UNet that predicts epsilon."""

    model_channels: Annotated[int, Range(ge=4, le=65_536)] = 64
    """Channels at the highest resolution; an even number."""
    channel_multipliers: tuple[Annotated[int, Range(ge=1, le=1024)], ...] = (1, 2, 2)
    """Channels of each level, as multiples of --model-channels; each level halves the resolution."""
    res_blocks: Annotated[int, Range(ge=1, le=1024)] = 2
    """Residual blocks per level."""
    attention_resolutions: tuple[Positive, ...] = (16,)
    """Feature-map sizes in pixels at which self-attention is used (the middle block always has it)."""
    head_channels: Positive = 32
    """Channels per attention head."""
    dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Dropout probability inside the residual blocks."""
    class_conditional: bool = False
    """Condition on the data's labels (needed for --guidance when sampling)."""


@dataclass(frozen=True)
class ImageConfig:
    """What one image of a dataset is; known from the data."""

    size: Positive
    channels: Positive
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to rebuild a trained model: what `config.json` in a model folder holds."""

    model: ModelConfig
    image: ImageConfig
    diffusion: DiffusionConfig
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam, its warm-up, clipping, and the averages of the weights."""

    learning_rate: MoreThanZero = 2e-4
    """Adam's step size after the warm-up."""
    warmup_steps: Natural = 100
    """Optimizer steps over which the learning rate grows linearly from zero."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's moment decay rates."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay (AdamW)."""
    clip_norm: NotNegative = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    ema_decays: tuple[Decay, ...] = (0.999,)
    """Decay rates of the weight averages; the first one is the model that is exported."""
    ema_lengths: tuple[EmaLength, ...] = ()
    """EDM2 power-function averages, as relative lengths sigma_rel; OUTPUT/snapshots keeps each as it
    stood at every checkpoint, and jobs/evaluate.py makes any other length of them (0.05 and 0.1 serve well)."""
    ema_device: EmaDevice = "worker"
    """Where the averages are kept: on the worker's device, or in main memory (cpu), which leaves a GPU's memory to the
    training and costs a copy of the weights each step. It changes no result but by rounding."""


@dataclass(frozen=True)
class Reading:
    """How raw data is read; prepared data needs none of it."""

    source: Source = "auto"
    """Kind of --data where it was not prepared; auto looks into it."""
    image_column: str = ""
    """Column with the images in Parquet and Arrow files; found by its type where there is only one."""
    label_column: str = ""
    """Column with the labels in Parquet and Arrow files, or in the metadata of a folder; none = take no labels."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run: what the data, the model and the optimizer are, and where everything goes."""

    data: str
    """Dataset to train on: a folder that jobs/prepare.py wrote, or any of the formats that it reads (URI)."""
    output: str
    """Where the run lives: checkpoints, configuration, models (a folder that all nodes see, or s3://, gs://…)."""
    steps: Steps = 10_000
    """Optimizer steps in all, whatever was done before a resume."""
    workers: Positive = 1
    """Data-parallel workers; the most that are used where --min-workers is given."""
    min_workers: Natural = 0
    """Elastic training: go on with as few as this many workers while nodes are missing; 0 = not elastic."""
    resize_seconds: MoreThanZero = 60.0
    """Elastic training: seconds between two looks at whether there is room for more workers."""
    batch_size: Positive = 128
    """Global batch size in images: split over the workers, never multiplied by them."""
    microbatch: Natural = 0
    """Images per forward pass in one worker, accumulating gradients; 0 = the worker's whole part."""
    seed: Seed = 0
    """Seed of the order of the data, of timesteps, noise, augmentation and of the first weights."""
    resume: bool = False
    """Go on from the newest complete checkpoint in --output; start a new run where there is none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    label_dropout: Share = 0.1
    """Share of samples whose label is hidden, for guidance (class-conditional models only)."""
    image_size: ImageSize = 0
    """Width and height in pixels that the images are brought to; 0 = their own."""
    random_flip: bool = False
    """Mirror half of the images, left to right."""
    random_crop: bool = False
    """Cut the square out of an image that is not one in a random place, not in its centre."""
    readers: Annotated[int, Range(ge=1, le=1024)] = 2
    """Processes beside each worker that read and decode its images."""
    cache_dir: str = ""
    """Folder on each node's own disk that keeps what is read of remote data, for later epochs; empty = none."""
    cache_gb: MoreThanZero = 100.0
    """Most gigabytes that it holds."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass; auto = bf16 where the hardware has it."""
    compile: bool = False
    """Run the network through torch.compile."""
    gpu: bool | None = None
    """Train on GPUs; left out = when the cluster has one for every worker, or its autoscaler brings them."""
    cpus_per_worker: Cpus = 1.0
    """CPUs (and CPU threads) that each worker reserves."""
    gpus_per_worker: GpuShare = 1.0
    """GPUs that a worker reserves where it trains on GPUs; with a fraction several runs share one (one worker each)."""
    peak_tflops: NotNegative = 0.0
    """TFLOP/s of a worker's device that the MFU curve is a share of; 0 = its matrix product, measured at the start."""
    log_every: Positive = 50
    """Steps between two points of the MLflow curves."""
    checkpoint_every: Positive = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: Positive = 3
    """Newest checkpoints that are kept; with --validate-every those of the lowest bits/dim, beside the newest one."""
    validate_every: Natural = 0
    """Checkpoints between two validations beside the training: held-out bits/dim and a sample grid; 0 = none."""
    validation_images: Natural = 256
    """Held-out images of each validation; 0 = all."""
    validation_terms: Natural = 20
    """Terms of the bound evaluated for each of them, stratified over t; 0 = all T."""
    validate_metrics: tuple[ValidationMetric, ...] = ("bits",)
    """Figures of a validation: bits, and of samples frechet, kernel, precision_recall, cas, as jobs/evaluate.py has them;
    by the same noise and the same real images, at most 10,000, every time."""
    validation_samples: Annotated[int, Range(ge=20)] = 500
    """Samples that all but bits are measured on: DDIM, 25 steps."""
    validation_features: str = "classifier"
    """classifier (trained on the data at the first validation), the folder of one, or a trusted TorchScript file."""
    storage_patience: NotNegative = 600
    """Seconds for which a storage that can't read or write a checkpoint is asked again before the run ends."""
    tracking_patience: NotNegative = 60
    """Seconds that the job waits for an MLflow that is away: before a new run, and at the end with what it missed."""
    max_failures: Natural = 10
    """Restarts of the worker group before the run is given up."""
    max_bad_fraction: Share = 0.01
    """Share of undecodable images at which the run stops."""
    skip_nonfinite: bool = False
    """Skip a step whose loss or gradient is not finite, instead of stopping the run."""
    max_skipped_in_a_row: Positive = 100
    """Skipped steps in a row at which the run stops all the same."""
    experiment: str = "ray-ddpm"
    """MLflow experiment."""
    run_name: str = ""
    """MLflow run name; empty = made of the data, the schedule and T."""
    register: str = ""
    """Name under which the finished model is registered in MLflow; empty = not registered."""
    alias: str = "newest"
    """Alias that is pointed at the registered version."""
    reading: Reading = field(default_factory=Reading)
    split: tuple[str, ...] = ()
    """The own splits of raw data to use; all, but a test split is left alone where there is a validation split."""


_T = TypeVar("_T")
# Settings that are gone, and why.
REMOVED = {"groups_per_window": "the shuffle follows from the data and the batch size"}
# Fields by the names that they had in 0.1.0, in files that it wrote and as flags.
RENAMED = {
    "class_dropout": "label_dropout",
    "leg": "incarnation",
    "manifold_neighbours": "precision_recall_neighbours",
}


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON types (tuples become lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(cls: type[_T], values: dict[str, Any], where: str = "config") -> _T:
    """The inverse of `to_dict`, for nested frozen dataclasses.

    Raises:
        InputError: a key that `cls` does not have, or a value of the wrong type.
    """
    from typing import get_args, get_origin, get_type_hints

    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a mapping, got {type(values).__name__}")
    hints = get_type_hints(cls)
    values = {name if name in hints else RENAMED.get(name, name): value for name, value in values.items()}
    unknown = sorted(set(values) - set(hints))
    if unknown:
        if unknown[0] in REMOVED:
            raise InputError(f"{where}: {unknown[0]!r} is gone, since {REMOVED[unknown[0]]}: leave it out")
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(hints))}")

    def convert(hint: Any, value: Any, name: str) -> Any:
        if dataclasses.is_dataclass(hint):
            return from_dict(hint, value, f"{where}.{name}")  # type: ignore[arg-type]
        # What a user writes is named as the flag is.
        setting = f"{where}: --{name.replace('_', '-')}" if where.startswith("--") else f"{where}.{name}"
        kinds = get_args(hint)
        if get_origin(hint) is Literal and (type(value), value) not in [(type(kind), kind) for kind in kinds]:
            raise InputError(f"{setting}: {value!r} is not one of {', '.join(map(str, kinds))}")
        if get_origin(hint) is tuple:
            if not isinstance(value, (list, tuple)):
                raise InputError(f"{setting}: expected a list, got {value!r}")
            if kinds[-1] is not Ellipsis and len(value) != len(kinds):
                raise InputError(f"{setting}: expected {len(kinds)} values, got {len(value)}")
            return tuple(convert(kinds[0], v, name) for v in value)
        if hint is float and type(value) is int:
            return float(value) if abs(value) < 2**1023 else math.inf
        if hint in (int, float, str, bool) and type(value) is not hint:
            raise InputError(f"{setting}: expected {hint.__name__}, got {value!r}")
        return value

    arguments = {name: convert(hints[name], value, name) for name, value in values.items()}
    try:
        return cls(**arguments)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from None


def leaf_fields(cls: Any, prefix: str = "") -> dict[str, Any]:
    """The types of every setting of a configuration and of those inside it, by dotted name."""
    from typing import get_type_hints

    leaves: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        nested = dataclasses.is_dataclass(hint)
        leaves |= leaf_fields(hint, f"{prefix}{name}.") if nested else {f"{prefix}{name}": hint}
    return leaves


class _Yaml(yaml.SafeLoader):
    """YAML 1.1, but that a number may have an exponent without a point, as JSON and YAML 1.2 have it: 1e-3."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$", re.ASCII),
    list("-+.0123456789"),
)


def load_yaml(path: str, flag: str = "--config") -> dict[str, Any]:
    """A YAML (or JSON) file as a dict; raises InputError when it can't be read or isn't a mapping."""
    try:
        values = yaml.load(Path(path).read_text(), _Yaml)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{flag} {path}: {reason}") from None
    if not isinstance(values, dict):
        raise InputError(f"{flag} {path}: expected settings as 'name: value' lines")
    return values
