"""The settings of an evaluation; imports neither torch nor Ray."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.config import EmaLength, Reading
from pipeline.errors import InputError
from pipeline.ranges import Natural, Positive, Range, Seed, check_ranges, help_groups

# Release 0.1.0 named precision_recall "manifold".
Metric = Literal[
    "bits", "frechet", "kernel", "precision_recall", "knn", "cas", "memorisation", "sfid", "inception_score", "manifold"
]  # fmt: skip
BITS_PER_DIM, FRECHET = "bits_per_dim", "frechet_distance"
"""Names of the figures by which runs and trials are compared."""


@help_groups(bound="terms", comparison="features", averages="ema_lengths", hardware="actors")
@dataclass(frozen=True)
class EvaluateConfig:
    """The settings of an evaluation: model, data, samples and metrics."""

    model: str
    """Exported model folder, models:/NAME/VERSION or models:/NAME@ALIAS."""
    data: str
    """Dataset to measure against: a folder that the prepare job wrote, or raw images that it reads (URI)."""
    samples: str = ""
    """Samples to compare with the data (URI): a folder that the generate job wrote as parquet or npz, or an .npz file.
    Empty = measure bits/dim alone."""
    output: str = ""
    """Folder for metrics.json, the terms of the bound and their plot, and the classifier (URI); empty = write none."""
    metrics: tuple[Metric, ...] = (
        "bits",
        "frechet",
        "kernel",
        "precision_recall",
        "knn",
        "cas",
        "memorisation",
    )
    """What to measure. All but bits need --samples; knn and cas need labels, memorisation two splits. sfid and
    inception_score need --features FILE with the Inception network (inception-2015-12-05.pt); with it, frechet is FID.
    manifold is the former name of precision_recall."""
    split: str = "validation"
    """Held-out split: bits/dim is measured on it, and its real images are measured as the samples are."""
    reference_split: str = "train"
    """Split that samples are compared with, and that the classifier is trained on."""
    seed: Seed = 0
    """Seed of the noise, of the classifier and of the choice of images."""
    terms: Natural = 0
    """Terms of the bound per image, an even number, for an estimate; 0 = all T, exact."""
    max_images: Natural = 1000
    """Images of the split for bits/dim, chosen by the seed; 0 = all."""
    batch_size: Positive = 64
    """Images per forward pass of the bound."""
    features: str = "classifier"
    """Features: classifier (trained on the data), the folder of one, or a TorchScript file. Such a file is a program: use
    only one that you trust."""
    reference_statistics: str = ""
    """npz file with published mu and sigma of these features (for sfid also mu_s and sigma_s). The distance to them is
    measured too; empty = no."""
    classifier_steps: Positive = 500
    """Optimizer steps of each classifier: the one for features, and the two that cas compares."""
    max_features: Natural = 10_000
    """Images per side for all but the Fréchet distance, which takes all; chosen by the seed. 0 = all."""
    kernel_subset_size: Annotated[int, Range(ge=2)] = 1000
    """Images per side in each subset of the kernel distance; fewer if there would be less than ten subsets."""
    precision_recall_neighbours: Positive = 3
    """Neighbours k of precision and recall."""
    knn_neighbours: Positive = 5
    """Neighbours k that vote on a sample's label: the real images nearest to it in pixels."""
    ema_lengths: tuple[EmaLength, ...] = ()
    """Relative lengths of EDM2 averages to compare by bits/dim, made from --snapshots. Each is written to --output."""
    snapshots: str = ""
    """Folder OUTPUT/snapshots of a training run with --ema-lengths (URI)."""
    actors: Natural = 0
    """Processes that measure; 0 = one per CPU of the cluster (per GPU if it measures on GPUs)."""
    gpu: bool | None = None
    """Measure on GPUs. None = if the cluster has any."""
    reading: Reading = field(default_factory=Reading)


def check(config: EvaluateConfig) -> None:
    """Checks the settings.

    Raises:
        InputError: names the wrong setting.
    """
    check_ranges(config)
    if bool(config.ema_lengths) != bool(config.snapshots):
        raise InputError("--ema-lengths and --snapshots go together: give both, or neither")
    if config.ema_lengths and "bits" not in config.metrics:
        raise InputError("--ema-lengths are compared by bits/dim: add bits to --metrics")
    if config.reference_statistics and (config.features == "classifier" or not config.samples):
        raise InputError(
            "--reference-statistics needs --samples, and --features FILE with the network of these statistics"
        )
    if config.features == "classifier" and (found := {"sfid", "inception_score"} & set(config.metrics)):
        raise InputError(
            f"--metrics {min(found)} needs --features FILE: the Inception network that defines it, as TorchScript"
        )
    if not config.samples and "bits" not in config.metrics:
        raise InputError(f"--metrics {' '.join(config.metrics)} needs --samples: give them, or add bits")
