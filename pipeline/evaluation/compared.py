"""Opens and checks what an evaluation compares: samples, real images, and the network for their features."""

import dataclasses
import hashlib
from dataclasses import dataclass

import torch

from pipeline import __version__
from pipeline.data.index import DatasetIndex, Splits
from pipeline.errors import InputError
from pipeline.evaluation.classifier import check_labels
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.features import Extractor, open_extractor
from pipeline.evaluation.frechet import Moments, Statistics, read_statistics
from pipeline.evaluation.inception import OF_INCEPTION, PREPROCESSING, Output, TorchScriptExtractor
from pipeline.evaluation.kernel import LEAST_IMAGES
from pipeline.evaluation.reading import open_samples


@dataclass(frozen=True)
class Compared:
    """The opened and checked inputs of an evaluation.

    Attributes:
        reference: real images that samples are compared with.
        samples: the samples.
        held_out: held-out real images.
        extractor: the network; None = the built-in classifier, which has yet to be trained.
        about: metrics of the extractor, such as its accuracy.
        statistics: published statistics of the same features, or None.
        of_inception: further outputs of the same network that the metrics need.
    """

    reference: DatasetIndex
    samples: DatasetIndex
    held_out: DatasetIndex
    extractor: Extractor | None
    about: dict[str, float]
    statistics: Statistics | None
    of_inception: dict[Output, Extractor]

    def measured_on(self, config: EvaluateConfig) -> dict[str, str]:
        """Everything that the metrics depend on except for the samples, in words."""
        held_out, most = self.held_out, config.max_features
        about = {
            "data": f"{held_out.uri}, fingerprint {held_out.fingerprint[:16]}",
            "real images": f"{self.reference.rows:,} of split {self.reference.split}",
            "held-out images": f"{held_out.rows:,} of split {held_out.split}",
            "chosen of a side, for all but Fréchet distances": f"at most {most:,}" if most else "all",
            "features": config.features
            if self.extractor
            else f"a classifier trained on the real images in {config.classifier_steps} steps",
            "images for the features": "uint8 from 0 to 255 in their own size",
            "seed": str(config.seed),
            "measured by": f"ray-ddpm {__version__}",
        }
        if isinstance(self.extractor, TorchScriptExtractor):
            about["features"] += f", sha256 {hashlib.sha256(self.extractor.data).hexdigest()[:16]}"
            about["images for the features"] = self.extractor.preprocessing()
        return about | {f"images for {OF_INCEPTION[name]}": PREPROCESSING[name] for name in self.of_inception}

    @property
    def sets(self) -> list[DatasetIndex]:
        """The reference, the samples, and the held-out images unless they are the reference."""
        one = self.reference.split == self.held_out.split
        return [self.reference, self.samples] + [self.held_out] * (not one)


def open_compared(config: EvaluateConfig, splits: Splits, model: str) -> Compared:
    """Opens the samples, and checks everything before anything is measured.

    Args:
        model: fingerprint of the model that must have made the samples; "" = any model.

    Raises:
        InputError: samples, data or features are unusable, or there are too few images.
    """
    held_out, reference = splits[config.split], splits[config.reference_split]
    samples = open_samples(config.samples, reference.image, model)
    extractor, about = None, dict[str, float]()
    if config.features == "classifier":
        check_labels(reference)
    else:
        extractor, about = open_extractor(config.features, reference.image)
        _embed_one(extractor, reference)
    others = _outputs_of_inception(config, extractor, reference)
    statistics = None
    if config.reference_statistics and extractor is not None:
        statistics = read_statistics(config.reference_statistics)
        _check_length(config, statistics.features, extractor, reference)
        if statistics.spatial and "spatial" in others:
            _check_length(config, statistics.spatial, others["spatial"], reference)
    compared = Compared(reference, samples, held_out, extractor, about, statistics, others)
    _check_counts(config, compared.sets)
    return compared


def _outputs_of_inception(
    config: EvaluateConfig, extractor: Extractor | None, reference: DatasetIndex
) -> dict[Output, Extractor]:
    found = dict[Output, Extractor]()
    for output, metric in OF_INCEPTION.items():
        if metric in config.metrics:
            if not isinstance(extractor, TorchScriptExtractor):
                raise InputError(
                    f"--metrics {metric}: --features {config.features} is not Inception's network"
                )
            found[output] = dataclasses.replace(extractor, output=output)
            _embed_one(found[output], reference)
    return found


def _check_length(
    config: EvaluateConfig, statistics: Moments, extractor: Extractor, reference: DatasetIndex
) -> None:
    numbers = _embed_one(extractor, reference)
    if numbers != len(statistics.mean):
        raise InputError(
            f"--reference-statistics {config.reference_statistics}: of {len(statistics.mean)} features, --features "
            f"{config.features} gives {numbers}: they belong to another network"
        )


@torch.no_grad()
def _embed_one(extractor: Extractor, index: DatasetIndex) -> int:
    """The number of features that an extractor gives for one image."""
    image = torch.zeros(1, index.image.channels, index.image.size, index.image.size, dtype=torch.uint8)
    return extractor.load("cpu")(image).shape[1]


def _check_counts(config: EvaluateConfig, sets: list[DatasetIndex]) -> None:
    """Checks the numbers of images before any work is done."""
    least = {
        "frechet": 2,
        "sfid": 2,
        "kernel": LEAST_IMAGES,
        "precision_recall": config.precision_recall_neighbours + 1,
        "knn": config.knn_neighbours,
    }
    for index in sets:
        rows = min(index.rows, config.max_features or index.rows)
        if missed := {name: least[name] for name in config.metrics if rows < least.get(name, 0)}:
            needs = ", ".join(f"{name} needs {count}" for name, count in missed.items())
            rest = " ".join(name for name in config.metrics if name not in missed)
            raise InputError(
                f"--metrics: {needs} images on each side, and {index.uri} has {rows} of its {index.split} split: give "
                + (f"more images, or --metrics {rest}" if rest else "more images")
            )
