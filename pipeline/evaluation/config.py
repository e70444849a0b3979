"""The settings of an evaluation; imports neither torch nor Ray."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.config import EmaLength, Reading
from pipeline.errors import InputError
from pipeline.ranges import Natural, Positive, Range, Seed, check_ranges

# "manifold" is what 0.1.0 called precision_recall.
Metric = Literal[
    "bits", "frechet", "kernel", "precision_recall", "knn", "cas", "memorisation", "sfid", "inception_score", "manifold"
]  # fmt: skip
BITS_PER_DIM, FRECHET = "bits_per_dim", "frechet_distance"
"""Names of figures, by which runs and trials are compared."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, on what."""

    model: str
    """Exported model folder, models:/NAME/VERSION or models:/NAME@ALIAS."""
    data: str
    """Dataset to measure against: a folder that jobs/prepare.py wrote, or any of the formats that it reads (URI)."""
    samples: str = ""
    """Samples to compare with the data: a folder of jobs/generate.py (--format parquet or npz), or an .npz file (URI)."""
    output: str = ""
    """Folder for metrics.json, the terms of the bound, their plot and the classifier (URI); empty = not written."""
    metrics: tuple[Metric, ...] = (
        "bits",
        "frechet",
        "kernel",
        "precision_recall",
        "knn",
        "cas",
        "memorisation",
    )
    """What to measure; all but bits need --samples, knn and cas also labels, memorisation two splits. sfid and
    inception_score need --features FILE: the Inception network by which they are defined (inception-2015-12-05.pt)."""
    split: str = "validation"
    """Held-out split: bits/dim is measured on it, and it is the real yardstick beside the samples."""
    reference_split: str = "train"
    """Split that samples are compared with, and that the classifier is trained on."""
    ema_lengths: tuple[EmaLength, ...] = ()
    """Lengths of EDM2 averages to compare by bits/dim, made of --snapshots; each is written as a model to --output."""
    snapshots: str = ""
    """Snapshots of a run trained with --ema-lengths: its output's folder `snapshots` (URI)."""
    terms: Natural = 0
    """Terms of the bound evaluated for each image, an even number: an estimate; 0 = every one, exactly."""
    max_images: Natural = 1000
    """Images of the split that bits/dim is measured on, chosen by the seed; 0 = all."""
    batch_size: Positive = 64
    """Images per forward pass of the bound."""
    features: str = "classifier"
    """classifier (trained on the data), the folder of one, or a TorchScript file: a program, so only one you trust."""
    reference_statistics: str = ""
    """npz file with mu and sigma of these features, and for sfid mu_s and sigma_s, as the field publishes them: the
    distance to those, too."""
    classifier_steps: Positive = 500
    """Optimizer steps of each classifier: for features, and for cas of the samples and of as many real images."""
    max_features: Natural = 10_000
    """Images a side for all but the Fréchet distance, which takes every one; chosen by the seed, 0 = all."""
    kernel_subset_size: Annotated[int, Range(ge=2)] = 1000
    """Images a side in each subset of the kernel distance; fewer where that would leave less than ten subsets."""
    precision_recall_neighbours: Positive = 3
    """k of precision and recall."""
    knn_neighbours: Positive = 5
    """k of the vote on a sample's label, among real images by their pixels."""
    seed: Seed = 0
    """Seed of the noise, of the classifier and of the choice of images."""
    actors: Natural = 0
    """Processes that measure; 0 = one per CPU of the cluster (per GPU where those are used)."""
    gpu: bool | None = None
    """Measure on GPUs; left out = when the cluster has any."""
    reading: Reading = field(default_factory=Reading)


def check(config: EvaluateConfig) -> None:
    """Whether the settings make sense.

    Raises:
        InputError: names the one that doesn't.
    """
    check_ranges(config)
    if bool(config.ema_lengths) != bool(config.snapshots):
        raise InputError("--ema-lengths and --snapshots go together: give both, or neither")
    if config.ema_lengths and "bits" not in config.metrics:
        raise InputError("--ema-lengths are compared by bits/dim: add bits to --metrics")
    if config.reference_statistics and (config.features == "classifier" or not config.samples):
        raise InputError(
            "--reference-statistics need --samples, and --features FILE: the network that they are of"
        )
    if config.features == "classifier" and (found := {"sfid", "inception_score"} & set(config.metrics)):
        raise InputError(
            f"--metrics {min(found)} needs --features FILE: the Inception network by which it is defined, as TorchScript"
        )
    if not config.samples and "bits" not in config.metrics:
        raise InputError(f"--metrics {' '.join(config.metrics)}: nothing to measure without --samples")
