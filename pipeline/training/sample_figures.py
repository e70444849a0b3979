"""Figures of a checkpoint's samples during training. Every validation uses the same noise, real images and classifier.

The run's output keeps the classifier and the features of the real images, so only the first validation makes them.
"""

import io
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import storage
from pipeline.cluster.pool import Pool
from pipeline.config import ModelSpec, TrainConfig
from pipeline.data.index import DatasetIndex
from pipeline.errors import InputError
from pipeline.evaluation.classifier import HELD_OUT_IMAGES, accuracy, fit, keep_classifier
from pipeline.evaluation.compare import compare_features
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.features import (
    IMAGES_PER_PASS,
    Extractor,
    FeatureSet,
    measure,
    open_extractor,
    thumbnails,
)
from pipeline.evaluation.frechet import Moments, moments_of
from pipeline.evaluation.reading import read_images
from pipeline.evaluation.work import choose
from pipeline.models.sampling import preview_floats, to_pixels
from pipeline.models.unet import UNet
from pipeline.rng import Choice

REAL_IMAGES, SAMPLES_TOGETHER, CLASSIFIER_STEPS = 10_000, 64, 500
FOLDER, CLASSIFIER, REFERENCE = "validation", "classifier", "reference.npz"


def sample_figures(
    config: TrainConfig,
    spec: ModelSpec,
    splits: tuple[DatasetIndex, DatasetIndex],
    output: str,
    model: UNet,
    pool: Pool,
) -> dict[str, float]:
    """Measures the figures in `config.validate_metrics`, all but bits.

    Args:
        splits: the training images and the held-out images.
        output: URI of the run.
        model: the model, on the device that computes.
        pool: measures the features of the real images.

    Returns:
        figures by name.

    Raises:
        InputError: a sample is not finite, or a figure can't be measured.
    """
    images, labels = _draw(config, spec, model)
    metrics = tuple(name for name in config.validate_metrics if name not in ("bits", "cas"))
    figures = dict[str, float]()
    if metrics:
        extractor = _extractor(config, splits, output, pool)
        real = _reference(config, splits[0], extractor, output, pool)
        embed = extractor.load(str(images.device))
        with torch.no_grad():
            features = np.concatenate([embed(part).cpu().numpy() for part in images.split(IMAGES_PER_PASS)])
        fake = FeatureSet(moments_of(features), features, labels.cpu().numpy(), thumbnails(images.cpu()))
        settings = EvaluateConfig(model="", data=splits[0].uri, metrics=metrics, seed=config.seed)
        figures |= compare_features(settings, real, fake)
    if "cas" in config.validate_metrics:
        net, held_out = fit(spec.image, images, labels, seed=config.seed, steps=CLASSIFIER_STEPS), splits[1]
        ids = choose(held_out.rows, HELD_OUT_IMAGES, config.seed, Choice.CLASSIFIER_TEST)
        shown = (part.to(images.device) for part in read_images(held_out, ids))
        if math.isfinite(score := accuracy(net, *shown)):  # else no held-out image has a label
            figures["classification_accuracy_score"] = score
    return figures | {"validation_samples": len(images)}


def _draw(config: TrainConfig, spec: ModelSpec, model: UNet) -> tuple[Tensor, Tensor]:
    """Draws samples 0, 1, … by DDIM.

    Returns:
        uint8 [N, C, H, W], and int64 [N]: the classes in turn, or -1 for an unconditional model.
    """
    count, classes = config.validation_samples, len(spec.image.classes)
    parts = [
        preview_floats(model, spec, min(SAMPLES_TOGETHER, count - first), first=first, seed=config.seed)
        for first in range(0, count, SAMPLES_TOGETHER)
    ]
    samples = torch.cat(parts)
    if not samples.isfinite().all():
        raise InputError("a sample is not finite, so there are no figures of samples")
    numbers = torch.arange(count, device=samples.device)
    labels = numbers % classes if spec.model.class_conditional else torch.full_like(numbers, -1)
    return to_pixels(samples), labels


def _extractor(
    config: TrainConfig, splits: tuple[DatasetIndex, DatasetIndex], output: str, pool: Pool
) -> Extractor:
    place = config.validation_features
    if place == "classifier":
        place = storage.join(output, FOLDER, CLASSIFIER)
        keep_classifier(place, *splits, seed=config.seed, steps=CLASSIFIER_STEPS, pool=pool)
    return open_extractor(place, splits[0].image, "--validation-features")[0]


def _reference(
    config: TrainConfig, train: DatasetIndex, extractor: Extractor, output: str, pool: Pool
) -> FeatureSet:
    """The features of real images, kept in the output. Measures them if none are kept, or those are damaged or of
    another network."""
    uri = storage.join(output, FOLDER, REFERENCE)
    try:
        with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as file:
            if str(file["of"]) == config.validation_features:
                moments = Moments(int(file["count"]), file["mean"], file["m2"])
                return FeatureSet(moments, file["features"], file["labels"], file["thumbnails"])
    except FileNotFoundError:
        pass
    except Exception as error:  # zipfile and NumPy raise anything on damaged files
        if storage.is_storage_error(error):
            raise
    (real,) = measure([train], extractor, keep=REAL_IMAGES, most=REAL_IMAGES, seed=config.seed, pool=pool)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {**vars(real), **vars(real.moments), "of": np.array(config.validation_features)}
    del arrays["moments"]
    np.savez(buffer, allow_pickle=False, **arrays)
    storage.write_atomic(uri, buffer.getvalue())
    return real
