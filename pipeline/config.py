"""Every setting of the project, as frozen dataclasses.

The field docstrings are the jobs' `--help`; the defaults are the flags' defaults. Nothing here imports
torch or Ray: a configuration can be read, checked and written anywhere.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from pipeline.errors import InputError

Variance = Literal["fixed_large", "fixed_small", "learned_range"]
LossKind = Literal["simple", "weighted", "vlb", "hybrid", "min_snr"]
TimestepSampler = Literal["uniform", "loss_second_moment"]
SamplerName = Literal["ancestral", "ddim", "dpm_solver"]
Precision = Literal["auto", "fp32", "bf16"]
Source = Literal[
    "auto", "digits", "idx", "cifar", "npz", "folder", "zip", "webdataset", "huggingface", "arrow"
]


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and the loss (Ho et al. 2020; Nichol & Dhariwal 2021)."""

    schedule: str = "cosine"
    """Noise schedule: linear, quadratic, cosine, sigmoid, constant, or the path of a file with a list of betas."""
    timesteps: int = 1000
    """T, the number of diffusion steps."""
    beta_start: float = 1e-4
    """First beta of linear and quadratic at T = 1000; other T rescale it."""
    beta_end: float = 0.02
    """Last beta of linear and quadratic at T = 1000; other T rescale it."""
    cosine_offset: float = 0.008
    """s of the cosine schedule: keeps the first betas from being too small."""
    sigmoid_temperature: float = 1.0
    """Temperature of the sigmoid schedule: lower ones fall more steeply in the middle."""
    variance: Variance = "fixed_large"
    """Reverse-process variance: beta, beta-tilde, or learned between the two in log space."""
    loss: LossKind = "simple"
    """Training objective: L_simple, the weighted L_t, L_vlb, L_hybrid, or min-SNR weighted L_simple."""
    timestep_sampler: TimestepSampler = "uniform"
    """How t is drawn in training."""
    vlb_weight: float = 0.001
    """Weight of L_vlb in L_hybrid (lambda of Improved DDPM, equation 16)."""
    min_snr_gamma: float = 5.0
    """Gamma of the min-SNR weighting (Hang et al. 2023)."""
    betas: tuple[float, ...] = ()
    """The betas themselves, in order; filled in from the file that --schedule names. Leave empty."""


@dataclass(frozen=True)
class ModelConfig:
    """The UNet that predicts epsilon."""

    model_channels: int = 64
    """Channels at the highest resolution; an even number."""
    channel_multipliers: tuple[int, ...] = (1, 2, 2)
    """Channels of each level, as multiples of --model-channels; each level halves the resolution."""
    res_blocks: int = 2
    """Residual blocks per level."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Feature-map sizes in pixels at which self-attention is used (the middle block always has it)."""
    head_channels: int = 32
    """Channels per attention head."""
    dropout: float = 0.0
    """Dropout probability inside the residual blocks."""
    class_conditional: bool = False
    """Condition on the data's labels (needed for --guidance when sampling)."""


@dataclass(frozen=True)
class ImageConfig:
    """What one image of a dataset is; known from the data."""

    size: int
    channels: int
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

    learning_rate: float = 2e-4
    """Adam's step size after the warm-up."""
    warmup_steps: int = 100
    """Optimizer steps over which the learning rate grows linearly from zero."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moment decay rates."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    ema_decays: tuple[float, ...] = (0.999,)
    """Decay rates of the weight averages; the first one is the model that is exported."""
    ema_lengths: tuple[float, ...] = ()
    """EDM2 power-function averages, as relative lengths sigma_rel in (0, 0.28]; OUTPUT/snapshots keeps each as it
    stood at every checkpoint, and jobs/evaluate.py makes any other length of them (0.05 and 0.1 serve well)."""


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
    steps: int = 10_000
    """Optimizer steps in all, whatever was done before a resume."""
    workers: int = 1
    """Data-parallel workers; the most that are used where --min-workers is given."""
    min_workers: int = 0
    """Elastic training: go on with as few as this many workers while nodes are missing; 0 = not elastic."""
    resize_seconds: float = 60.0
    """Elastic training: seconds between two looks at whether there is room for more workers."""
    batch_size: int = 128
    """Global batch size in images: split over the workers, never multiplied by them."""
    microbatch: int = 0
    """Images per forward pass in one worker, accumulating gradients; 0 = the worker's whole part."""
    seed: int = 0
    """Seed of the order of the data, of timesteps, noise, augmentation and of the first weights."""
    resume: bool = False
    """Go on from the newest complete checkpoint in --output; start a new run where there is none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    label_dropout: float = 0.1
    """Share of samples whose label is hidden, for guidance (class-conditional models only)."""
    image_size: int = 0
    """Width and height in pixels that the images are brought to; 0 = their own."""
    random_flip: bool = False
    """Mirror half of the images, left to right."""
    random_crop: bool = False
    """Cut the square out of an image that is not one in a random place, not in its centre."""
    readers: int = 2
    """Processes beside each worker that read and decode its images."""
    cache_dir: str = ""
    """Folder on each node's own disk that keeps what is read of remote data, for later epochs; empty = none."""
    cache_gb: float = 100.0
    """Most gigabytes that it holds."""
    groups_per_window: int = 16
    """Groups of rows that are mixed by the shuffle at a time; more mixes better and needs more memory."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass; auto = bf16 where the hardware has it."""
    compile: bool = False
    """Run the network through torch.compile."""
    gpu: bool | None = None
    """Train on GPUs; left out = when the cluster has one for every worker."""
    cpus_per_worker: float = 1.0
    """CPUs (and CPU threads) that each worker reserves."""
    peak_tflops: float = 0.0
    """TFLOP/s of a worker's device that the MFU curve is a share of; 0 = its matrix product, measured at the start."""
    log_every: int = 50
    """Steps between two points of the MLflow curves."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept; with --validate-every those of the lowest bits/dim, beside the newest one."""
    validate_every: int = 0
    """Checkpoints between two validations beside the training: held-out bits/dim and a sample grid; 0 = none."""
    validation_images: int = 256
    """Held-out images of each validation; 0 = all."""
    validation_terms: int = 20
    """Terms of the bound evaluated for each of them, stratified over t; 0 = all T."""
    storage_patience: float = 600
    """Seconds for which a storage that can't read or write a checkpoint is asked again before the run ends."""
    max_failures: int = 10
    """Restarts of the worker group before the run is given up."""
    max_bad_fraction: float = 0.01
    """Share of undecodable images at which the run stops."""
    skip_nonfinite: bool = False
    """Skip a step whose loss or gradient is not finite, instead of stopping the run."""
    experiment: str = "ray-ddpm"
    """MLflow experiment."""
    run_name: str = ""
    """MLflow run name; empty = MLflow invents one."""
    register: str = ""
    """Name under which the finished model is registered in MLflow; empty = not registered."""
    alias: str = "newest"
    """Alias that is pointed at the registered version."""
    reading: Reading = field(default_factory=Reading)
    split: tuple[str, ...] = ()
    """The own splits of raw data to use; all, but a test split is left alone where there is a validation split."""


_T = TypeVar("_T")
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
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(hints))}")

    def convert(hint: Any, value: Any, name: str) -> Any:
        if dataclasses.is_dataclass(hint):
            return from_dict(hint, value, f"{where}.{name}")  # type: ignore[arg-type]
        origin = get_origin(hint)
        if origin is Literal and value not in get_args(hint):
            raise InputError(f"{where}.{name}: {value!r} is not one of {', '.join(map(str, get_args(hint)))}")
        if origin is tuple:
            if not isinstance(value, (list, tuple)):
                raise InputError(f"{where}.{name}: expected a list, got {value!r}")
            return tuple(convert(get_args(hint)[0], v, name) for v in value)
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if hint in (int, float, str, bool) and type(value) is not hint:
            raise InputError(f"{where}.{name}: expected {hint.__name__}, got {value!r}")
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


def check_at_least(config: Any, **least: float) -> None:
    """Refuses settings below their least value, or that are not a number.

    Args:
        least: by field name.

    Raises:
        InputError: names the flag.
    """
    for name, value in least.items():
        if not getattr(config, name) >= value:
            raise InputError(
                f"--{name.replace('_', '-')} must be at least {value}, got {getattr(config, name)}"
            )


def load_yaml(path: str, flag: str = "--config") -> dict[str, Any]:
    """A YAML (or JSON) file as a dict; raises InputError when it can't be read or isn't a mapping."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{flag} {path}: {reason}") from None
    if not isinstance(values, dict):
        raise InputError(f"{flag} {path}: expected settings as 'name: value' lines")
    return values
