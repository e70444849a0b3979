"""Every setting of the project, as frozen dataclasses.

The field docstrings are the jobs' `--help`; the defaults are the flags' defaults. Nothing here imports
torch or Ray: a configuration can be read, checked and written anywhere.
"""

import dataclasses
import difflib
import functools
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
    help_groups,
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


# A checkpoint's name has nine digits for the step.
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
    """First beta of the linear and quadratic schedules, given for T = 1000 and rescaled to other T."""
    beta_end: Annotated[float, Range(gt=0, lt=1)] = 0.02
    """Last beta of the linear and quadratic schedules, given for T = 1000 and rescaled to other T."""
    cosine_offset: MoreThanZero = 0.008
    """Offset s of the cosine schedule, which keeps the first betas from being too small."""
    sigmoid_temperature: MoreThanZero = 1.0
    """Temperature of the sigmoid schedule; a lower one falls more steeply in the middle."""
    log_snr_first: Annotated[float, Range(ge=0, le=30)] = 10.0
    """log(alpha_bar / (1 - alpha_bar)) at the first step of the log_snr schedule."""
    log_snr_last: Annotated[float, Range(ge=-30, le=0)] = -10.0
    """log(alpha_bar / (1 - alpha_bar)) at the last step of the log_snr schedule."""
    variance: Variance = "fixed_large"
    """Variance of the reverse process: beta (fixed_large), beta-tilde (fixed_small), or learned between the two."""
    loss: LossKind = "simple"
    """Training objective: simple (L_simple), weighted (L_t with its weights), vlb (L_vlb), hybrid (L_hybrid), or min_snr
    (L_simple with min-SNR weights). vlb and hybrid train --variance learned_range."""
    timestep_sampler: TimestepSampler = "uniform"
    """How training draws t: uniform, or loss_second_moment (in proportion to the root mean square of its loss)."""
    vlb_weight: NotNegative = 0.001
    """Weight of L_vlb in L_hybrid (lambda of Improved DDPM, equation 16)."""
    min_snr_gamma: MoreThanZero = 5.0
    """Gamma of the min-SNR weighting (Hang et al. 2023)."""
    betas: tuple[Finite, ...] = ()
    """Leave empty: the job fills in the betas from the file that --schedule names."""


@dataclass(frozen=True)
class ModelConfig:
    """The UNet that predicts epsilon."""

    model_channels: Annotated[int, Range(ge=4, le=65_536)] = 64
    """Channels at the full resolution; an even number."""
    channel_multipliers: tuple[Annotated[int, Range(ge=1, le=1024)], ...] = (1, 2, 2)
    """Channels of each level, as multiples of --model-channels. Each further level halves the resolution."""
    res_blocks: Annotated[int, Range(ge=1, le=1024)] = 2
    """Residual blocks per level."""
    attention_resolutions: tuple[Positive, ...] = (16,)
    """Widths of the feature maps, in pixels, that get self-attention. The middle block always has it."""
    head_channels: Positive = 32
    """Channels per attention head; must divide the channels of each level with attention."""
    dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Dropout probability inside the residual blocks."""
    class_conditional: bool = False
    """Condition the model on the data's labels. Sampling by class and --guidance need it."""
    fourier_features: tuple[Annotated[int, Range(ge=0, le=16)], ...] = ()
    """Powers n for which the network also sees sin(2^n pi x_t) and cos(2^n pi x_t), e.g. 3 4 5 6 7 (Kingma et al. 2021).
    They lower bits/dim of 8-bit images. Such a model can't be exported to diffusers."""


@dataclass(frozen=True)
class ImageConfig:
    """Form of a dataset's images, known from the data: width and height in pixels, channels, names of the classes."""

    size: Positive
    channels: Positive
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """Everything that is needed to rebuild a trained model. `config.json` in a model folder holds it.

    Attributes:
        provenance: origin of the model: releases, data, settings of the training.
    """

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
    """Decay rates per step of the averages of the weights. The first average is the exported model."""
    ema_lengths: tuple[EmaLength, ...] = ()
    """Relative lengths (sigma_rel) of EDM2 power-function averages. OUTPUT/snapshots keeps them at every checkpoint, and
    the evaluate job makes averages of other lengths from them. 0.05 and 0.1 serve well."""
    ema_device: EmaDevice = "worker"
    """Memory that holds the averages: the worker's device, or main memory (cpu). cpu saves GPU memory and costs one copy
    of the weights per step."""


@dataclass(frozen=True)
class Reading:
    """How raw data is read; prepared data needs none of it."""

    source: Source = "auto"
    """Format of raw data; auto finds it by looking at the files."""
    image_column: str = ""
    """Column with the images in Parquet and Arrow files; empty = the only one of that type."""
    label_column: str = ""
    """Column with the labels in Parquet and Arrow files, or in a folder's metadata; none = read no labels."""


@help_groups(
    images="image_size",
    hardware="min_workers",
    checkpoint="checkpoint_every",
    validation="validate_every",
    failure="storage_patience",
    tracking="experiment",
)
@dataclass(frozen=True)
class TrainConfig:
    """One training run: data, model, optimizer, hardware and output."""

    data: str
    """Dataset to train on: a folder that the prepare job wrote, or raw images that it reads (URI)."""
    output: str
    """Folder for the run's checkpoints, settings and models (URI). All nodes must see it."""
    steps: Steps = 10_000
    """Optimizer steps in all, those before a resume included."""
    batch_size: Positive = 128
    """Images per optimizer step, all workers together."""
    workers: Positive = 1
    """Data-parallel workers; with --min-workers the most of them."""
    gpu: bool | None = None
    """Train on GPUs. None = only if the cluster has, or can add, a GPU for every worker."""
    seed: Seed = 0
    """Seed of the data order, the timesteps, the noise, the augmentation and the initial weights."""
    resume: bool = False
    """Continue from the newest whole checkpoint in --output; without one, start a new run."""
    register: str = ""
    """Register the finished model in MLflow under this name; other jobs then load it as models:/NAME@ALIAS. Empty = do
    not register."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    image_size: ImageSize = 0
    """Width and height, in pixels, to which images are resized; 0 = keep their own."""
    random_flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    random_crop: bool = False
    """Crop images that are not square at a random place, not at the centre."""
    label_dropout: Share = 0.1
    """Share of images trained without their label, which guidance needs (class-conditional models only)."""
    split: tuple[str, ...] = ()
    """Splits of raw data to use. Empty = all, but without the test split if there is a validation split."""
    reading: Reading = field(default_factory=Reading)
    min_workers: Natural = 0
    """Elastic training: continue with at least this many workers while nodes are missing; 0 = not elastic."""
    resize_seconds: MoreThanZero = 60.0
    """Elastic training: seconds between two checks for room for more workers."""
    microbatch: Natural = 0
    """Images per forward pass of one worker; gradients are accumulated. 0 = the worker's part of the batch at once."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass; auto = bf16 if the hardware supports it, else fp32."""
    compile: bool = False
    """Compile the network with torch.compile. The first step then takes minutes."""
    cpus_per_worker: Cpus = 1.0
    """CPUs that each worker reserves; it computes with as many threads."""
    gpus_per_worker: GpuShare = 1.0
    """GPUs that each worker reserves when training on GPUs. A fraction lets several runs of one worker share a GPU."""
    readers: Annotated[int, Range(ge=1, le=1024)] = 2
    """Processes per worker that read and decode images."""
    cache_dir: str = ""
    """Folder on each node's own disk that caches remote data for later epochs; empty = no cache."""
    cache_gb: MoreThanZero = 100.0
    """Size limit of that cache, in gigabytes per node."""
    peak_tflops: NotNegative = 0.0
    """TFLOP/s of a worker's device, for the MFU curve; 0 = measure a matrix product at the start."""
    checkpoint_every: Positive = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: Positive = 3
    """Newest checkpoints to keep; with --validate-every those with the lowest bits/dim, and the newest."""
    validate_every: Natural = 0
    """Checkpoints between two validations (held-out bits/dim and a grid of samples); 0 = none. The steps go on
    meanwhile."""
    validation_images: Natural = 256
    """Held-out images per validation; 0 = all."""
    validation_terms: Natural = 20
    """Terms of the bound per image, stratified over t; an even number; 0 = all T."""
    validate_metrics: tuple[ValidationMetric, ...] = ("bits",)
    """Figures of a validation: bits (required), and of samples frechet, kernel, precision_recall, cas. Every validation
    uses the same noise and the same real images, at most 10,000."""
    validation_samples: Annotated[int, Range(ge=20)] = 500
    """Samples per validation for the figures of samples, made by 25 steps of DDIM."""
    validation_features: str = "classifier"
    """Features of those figures: classifier (trained on the data at the first validation), the folder of one, or a
    TorchScript file. Such a file is a program: use only one that you trust."""
    storage_patience: NotNegative = 600
    """Seconds to retry a storage that can't read or write a checkpoint, before the run ends."""
    max_failures: Natural = 10
    """Restarts of the workers before the run gives up."""
    max_bad_fraction: Share = 0.01
    """Share of undecodable images above which the run stops."""
    skip_nonfinite: bool = False
    """Skip a step whose loss or gradient is not finite; without this flag the run stops."""
    max_skipped_in_a_row: Positive = 100
    """Skipped steps in a row after which the run stops all the same."""
    experiment: str = "ray-ddpm"
    """Name of the MLflow experiment."""
    run_name: str = ""
    """Name of the MLflow run; empty = made from the data, the schedule and T."""
    alias: str = "newest"
    """Alias that points to the registered version (with --register)."""
    log_every: Positive = 50
    """Steps between two points of the MLflow curves."""
    tracking_patience: NotNegative = 60
    """Seconds to wait for MLflow if it does not answer, before a new run and again at the end."""


_T = TypeVar("_T")
# Settings that were removed, each with the reason.
REMOVED = {"groups_per_window": "the shuffle follows from the data and the batch size"}
# New names of fields that release 0.1.0 named differently, in its files and as flags.
RENAMED = {
    "class_dropout": "label_dropout",
    "leg": "incarnation",
    "manifold_neighbours": "precision_recall_neighbours",
}
# Settings under their names in improved-diffusion, denoising-diffusion-pytorch and diffusers. A hint for an unknown name
# tells them; a name that is merely spelled alike would mislead.
ELSEWHERE = {
    "checkpointing_steps": "checkpoint_every",
    "cfg_scale": "guidance",
    "dataloader_num_workers": "readers",
    "dataset_name": "data",
    "ddim_sampling_eta": "eta",
    "ddpm_beta_schedule": "schedule",
    "device": "gpu",
    "diffusion_steps": "timesteps",
    "dim": "model_channels",
    "dim_mults": "channel_multipliers",
    "ema_rate": "ema_decays",
    "epochs": "steps",
    "fp16": "precision",
    "gradient_accumulation_steps": "microbatch",
    "learn_sigma": "variance",
    "log_interval": "log_every",
    "logdir": "output",
    "lr": "learning_rate",
    "lr_anneal_steps": "steps",
    "max_grad_norm": "clip_norm",
    "max_train_steps": "steps",
    "num_epochs": "steps",
    "num_gpus": "workers",
    "num_inference_steps": "sampling_steps",
    "num_processes": "workers",
    "num_samples": "count",
    "num_train_epochs": "steps",
    "num_train_timesteps": "timesteps",
    "num_workers": "readers",
    "out": "output",
    "outdir": "output",
    "resolution": "image_size",
    "results_folder": "output",
    "resume_checkpoint": "resume",
    "resume_from_checkpoint": "resume",
    "save_and_sample_every": "checkpoint_every",
    "save_interval": "checkpoint_every",
    "schedule_sampler": "timestep_sampler",
    "timestep_respacing": "sampling_steps",
    "train_data_dir": "data",
    "train_lr": "learning_rate",
    "train_num_steps": "steps",
    "use_ddim": "sampler",
    "use_fp16": "precision",
}
# The same for values.
VALUES_ELSEWHERE = {
    "ddpm": "ancestral",
    "dpm++": "dpm_solver",
    "fid": "frechet",
    "kid": "kernel",
    "mse": "simple",
    "no": "fp32",
}


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a dataclass to plain JSON types. Tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(cls: type[_T], values: dict[str, Any], where: str = "config", root: type | None = None) -> _T:
    """The inverse of `to_dict`, for nested frozen dataclasses.

    Args:
        where: origin of the values, for messages.
        root: the outermost dataclass if `cls` is nested in it. A hint for an unknown key may name any field of it.

    Raises:
        InputError: a key that `cls` does not have, or a value of the wrong type.
    """
    from typing import get_args, get_origin

    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a mapping, got {type(values).__name__}")
    hints = _hints(cls)  # type: ignore[arg-type]
    values = {name if name in hints else RENAMED.get(name, name): value for name, value in values.items()}
    unknown = sorted(set(values) - set(hints))
    if unknown:
        if unknown[0] in REMOVED:
            raise InputError(f"{where}: {unknown[0]!r} is gone, since {REMOVED[unknown[0]]}: leave it out")
        hint = nearest_setting(unknown[0], root or cls) or f"known keys: {', '.join(sorted(hints))}"
        raise InputError(f"{where}: unknown key {unknown[0]!r}; {hint}")

    def convert(hint: Any, value: Any, name: str) -> Any:
        if dataclasses.is_dataclass(hint):
            return from_dict(hint, value, f"{where}.{name}", root or cls)  # type: ignore[arg-type]
        # A setting that a user wrote is shown as its flag.
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


def nearest_name(key: str, cls: type) -> str:
    """The dotted name of the setting that an unknown name or flag most likely means; "" if none is likely."""
    leaves = {name.rpartition(".")[2]: name for name in leaf_fields(cls)}
    wanted = key.lstrip("-").replace("-", "_").rpartition(".")[2]
    if ELSEWHERE.get(wanted) in leaves:
        return leaves[ELSEWHERE[wanted]]
    near = difflib.get_close_matches(wanted, leaves, n=1, cutoff=0.7)
    return leaves[near[0]] if near else ""


def nearest_setting(key: str, cls: type) -> str:
    """A question that suggests a setting with a similar name, and its place; "" if none is similar."""
    name = nearest_name(key, cls)
    if not name:
        return ""
    section, _, leaf = name.rpartition(".")
    place = f"{section}.{leaf}, written {section}: {{{leaf}: …}}" if section else f"{leaf}, at the top level"
    return f"did you mean {place}?"


def leaf_fields(cls: Any, prefix: str = "") -> dict[str, Any]:
    """The type of every setting of a configuration by dotted name, those of nested configurations included."""
    leaves: dict[str, Any] = {}
    for name, hint in _hints(cls).items():
        nested = dataclasses.is_dataclass(hint)
        leaves |= leaf_fields(hint, f"{prefix}{name}.") if nested else {f"{prefix}{name}": hint}
    return leaves


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The type of every field of a dataclass by name, which Python works out anew at each call."""
    from typing import get_type_hints

    return get_type_hints(cls)


class _Yaml(yaml.SafeLoader):
    """YAML 1.1, with numbers such as 1e-3, which have an exponent but no point, as in JSON and YAML 1.2.

    A name that is given twice is refused, because only the last value would count.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The node of a mapping, with every name once."""
        node = super().compose_mapping_node(anchor)
        names = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.composer.ComposerError(
                    None, None, f"{key.value!r} is given a second time", key.start_mark
                )
            names.add(key.value)
        return node


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$", re.ASCII),
    list("-+.0123456789"),
)


def load_yaml(path: str, flag: str = "--config") -> dict[str, Any]:
    """Reads a YAML or JSON file with settings.

    Args:
        path: path of the file.
        flag: the flag that named the file, for messages.

    Raises:
        InputError: the file can't be read, or is not a mapping.
    """
    try:
        values = yaml.load(Path(path).read_text(), _Yaml)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", line', "at line")
        raise InputError(f"{flag} {path}: {reason}") from None
    if not isinstance(values, dict):
        raise InputError(f"{flag} {path}: expected settings as 'name: value' lines")
    return values
