"""Computes feature vectors of images, with any TorchScript network or the built-in classifier."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import storage
from pipeline.cluster.pool import Pool, in_process
from pipeline.config import ImageConfig
from pipeline.data.index import DatasetIndex
from pipeline.errors import InputError
from pipeline.evaluation.classifier import CONFIG, Classifier, load_classifier
from pipeline.evaluation.frechet import Moments, merge_moments, moments_of
from pipeline.evaluation.inception import Embed, read_torchscript
from pipeline.evaluation.reading import image_names, read_images
from pipeline.evaluation.work import Partial, choose, cut
from pipeline.rng import Choice

IMAGES_PER_TASK = 2048
IMAGES_PER_PASS = 64
LARGEST_THUMBNAIL = 32
NAMED = 5


class Extractor(Protocol):
    """A network that can be pickled and sent to where it is used."""

    def load(self, device: str) -> Embed:
        """Loads the network on a device ("cpu", "cuda")."""


@dataclass(frozen=True)
class ClassifierExtractor:
    """The features of the built-in classifier, before its logits."""

    net: Classifier

    def load(self, device: str) -> Embed:
        """See `Extractor`."""
        return self.net.to(device).features


def open_extractor(
    uri: str, image: ImageConfig, flag: str = "--features"
) -> tuple[Extractor, dict[str, float]]:
    """Opens the network that --features names: the folder of a classifier or a TorchScript file.

    Args:
        flag: flag that names it, for errors.

    Returns:
        the network, and metrics about it (the classifier's accuracy).

    Raises:
        InputError: the network is unusable, or made for images other than `image`.
    """
    if not storage.exists(storage.join(uri, CONFIG)):
        return read_torchscript(uri, flag), {}
    net, trained_on, accuracy = load_classifier(uri)
    if trained_on != image:
        raise InputError(f"{flag} {uri}: trained on images of another size or other classes")
    return ClassifierExtractor(net), about_classifier(accuracy)


def about_classifier(accuracy: float) -> dict[str, float]:
    """The metric about a classifier; {} if no held-out image has a label, and so the accuracy is NaN."""
    return {"classifier_accuracy": accuracy} if math.isfinite(accuracy) else {}


@dataclass(frozen=True)
class FeatureSet:
    """The features of a dataset.

    Attributes:
        moments: moments of the features of all measured images.
        features: features of the kept images, float32 [K, D].
        labels: their labels, int64 [K]; -1 for none.
        thumbnails: their pixels in [0, 1], averaged down to at most 32x32: float32 [K, P].
    """

    moments: Moments
    features: np.ndarray
    labels: np.ndarray
    thumbnails: np.ndarray


@dataclass(frozen=True)
class FeatureWork:
    """Computes the moments of a task's features, and everything about its images that are in `kept`."""

    index: DatasetIndex
    extractor: Extractor
    kept: np.ndarray

    def start(self, device: str) -> Callable[[np.ndarray], Partial]:
        """See `pool.Work`."""
        embed = self.extractor.load(device)

        @torch.no_grad()
        def do(ids: np.ndarray) -> Partial:
            images, labels = read_images(self.index, ids)
            features = np.concatenate(
                [embed(part.to(device)).cpu().numpy() for part in images.split(IMAGES_PER_PASS)]
            )
            if len(bad := ids[~np.isfinite(features).all(axis=1)]):
                some = ", ".join(image_names(self.index, bad[:NAMED])) + ", …" * (len(bad) > NAMED)
                raise InputError(f"--features: the features of {len(bad)} images are not finite: {some}")
            moments, kept = moments_of(features), np.isin(ids, self.kept)
            return {
                "count": np.array([moments.count]),
                "mean": moments.mean,
                "m2": moments.m2,
                "features": features[kept],
                "labels": labels.numpy()[kept],
                "thumbnails": thumbnails(images[torch.from_numpy(kept)]),
            }

        return do


def measure(
    indexes: Sequence[DatasetIndex],
    extractor: Extractor,
    *,
    keep: int,
    most: int = 0,
    seed: int = 0,
    pool: Pool = in_process,
) -> list[FeatureSet]:
    """Measures the features of datasets: moments, and the vectors of some images of each dataset.

    Args:
        indexes: datasets of one image size. They are measured in one run, because each start of the actors costs
            seconds.
        keep: number of images of each dataset whose vectors are kept, chosen by the seed; 0 = all.
        most: number of images of each dataset that are measured, including the kept ones; 0 = all.
    """
    joined = replace(indexes[0], groups=tuple(group for index in indexes for group in index.groups))
    ends = np.cumsum([index.rows for index in indexes])
    firsts = [end - index.rows for end, index in zip(ends, indexes, strict=True)]
    tasks = [
        cut(first + choose(index.rows, most, seed, Choice.FEATURES), IMAGES_PER_TASK)
        for first, index in zip(firsts, indexes, strict=True)
    ]
    kept = [
        first + choose(index.rows, keep or most, seed, Choice.FEATURES)
        for first, index in zip(firsts, indexes, strict=True)
    ]
    results = pool(
        FeatureWork(joined, extractor, np.concatenate(kept)),
        [ids for mine in tasks for ids in mine],
        "features",
    )
    return [_merge(islice(results, len(mine))) for mine in tasks]


def _merge(parts: Iterable[Partial]) -> FeatureSet:
    moments: Moments | None = None
    columns: dict[str, list[np.ndarray]] = {"features": [], "labels": [], "thumbnails": []}
    # Parts are merged as they arrive, because the moments of one task have D^2 numbers.
    for part in parts:
        here = Moments(int(part["count"][0]), part["mean"], part["m2"])
        moments = merge_moments([moments, here]) if moments else here
        for name, values in columns.items():
            values.append(part[name])
    assert moments is not None, "a dataset has at least one image"
    return FeatureSet(moments, **{name: np.concatenate(values) for name, values in columns.items()})


def thumbnails(images: Tensor) -> np.ndarray:
    """Averages uint8 [N, C, H, W] down to at most 32x32 pixels, scaled to [0, 1]: float32 [N, P]."""
    pixels = images.float() / 255
    if len(images) and images.shape[-1] > LARGEST_THUMBNAIL:
        pixels = F.adaptive_avg_pool2d(pixels, LARGEST_THUMBNAIL)
    flat: np.ndarray = pixels.flatten(1).numpy()
    return flat
