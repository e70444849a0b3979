"""Compares samples with real images by metrics."""

import sys

import numpy as np
import torch

from pipeline import storage
from pipeline.cluster.pool import Pool
from pipeline.evaluation.classifier import TRAINING_IMAGES, save_classifier, train_classifier
from pipeline.evaluation.compared import Compared
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.features import ClassifierExtractor, FeatureSet, about_classifier, measure
from pipeline.evaluation.frechet import Moments, Statistics, frechet_distance, write_statistics
from pipeline.evaluation.inception import inception_score
from pipeline.evaluation.kernel import kernel_distance
from pipeline.evaluation.memorisation import QUERIES, memorised, nearest_images
from pipeline.evaluation.neighbours import knn_label_accuracy, precision_recall
from pipeline.evaluation.reading import read_images
from pipeline.evaluation.work import choose, spread_out
from pipeline.pictures import draw
from pipeline.rng import Choice

SHOWN = 64


def measure_quality(config: EvaluateConfig, compared: Compared, pool: Pool) -> dict[str, float]:
    """Metrics of the samples by name. `*_real` are the same metrics of the held-out images in their place."""
    extractor, metrics = compared.extractor, dict(compared.about)
    if extractor is None:
        net, accuracy = train_classifier(
            compared.reference, compared.held_out, seed=config.seed, steps=config.classifier_steps, pool=pool
        )
        extractor, metrics = ClassifierExtractor(net), about_classifier(accuracy)
        if config.output:
            folder = storage.join(config.output, "classifier")
            save_classifier(folder, net, compared.reference.image, accuracy)
    real, fake, *others = measure(
        compared.sets, extractor, keep=config.max_features, seed=config.seed, pool=pool
    )
    metrics |= {"samples": compared.samples.rows} | compare_features(config, real, fake)
    if compared.statistics:
        metrics["frechet_distance_to_statistics"] = frechet_distance(
            compared.statistics.features, fake.moments
        )
    found, spatial = _by_inception(config, compared, pool)
    metrics |= found
    if config.output:
        write_statistics(storage.join(config.output, "statistics.npz"), Statistics(real.moments, spatial))
    for other in others:
        yardstick = compare_features(config, real, other)
        metrics |= {"samples_real": compared.held_out.rows} | {
            f"{name}_real": value for name, value in yardstick.items()
        }
        if "memorisation" in config.metrics:
            metrics |= _memorisation(config, compared, fake, other, pool)
    if not _labelled(real, fake, *others) and {"knn", "cas"} & set(config.metrics):
        why = "not all images have a label that is a class of the data"
        print(f"evaluate: knn and cas are left out where {why}", file=sys.stderr)
    elif "cas" in config.metrics and len(compared.reference.image.classes) > 1:
        metrics |= _classification_accuracy(config, compared, pool)
    return metrics


def _by_inception(
    config: EvaluateConfig, compared: Compared, pool: Pool
) -> tuple[dict[str, float], Moments | None]:
    """Metrics that only Inception's network defines, and the moments of its spatial features of real images."""
    metrics, spatial = dict[str, float](), None
    if extractor := compared.of_inception.get("spatial"):
        real, *others = measure(compared.sets, extractor, keep=1, seed=config.seed, pool=pool)
        spatial = real.moments
        for suffix, other in zip(("", "_real"), others, strict=False):
            metrics[f"sfid{suffix}"] = frechet_distance(spatial, other.moments)
        if compared.statistics and compared.statistics.spatial:
            metrics["sfid_to_statistics"] = frechet_distance(compared.statistics.spatial, others[0].moments)
    if extractor := compared.of_inception.get("probabilities"):
        for suffix, of in zip(
            ("", "_real"), measure(compared.sets[1:], extractor, keep=0, pool=pool), strict=False
        ):
            score, spread = inception_score(of.features)
            metrics |= {f"inception_score{suffix}": score, f"inception_score_std{suffix}": spread}
    return metrics, spatial


def _classification_accuracy(config: EvaluateConfig, compared: Compared, pool: Pool) -> dict[str, float]:
    """Classification accuracy score (Ravuri & Vinyals 2019): held-out accuracy of a classifier trained only on samples.

    For comparison, `*_real` is that of a classifier trained on as many real images, in as many steps.
    """
    most = min(compared.samples.rows, compared.reference.rows, TRAINING_IMAGES)
    scores = [
        train_classifier(
            index, compared.held_out, seed=config.seed, steps=config.classifier_steps, most=most, pool=pool
        )[1]
        for index in (compared.samples, compared.reference)
    ]
    return {
        "classification_accuracy_score": scores[0],
        "classification_accuracy_score_real": scores[1],
        "classification_accuracy_score_images": most,
    }


def _memorisation(
    config: EvaluateConfig, compared: Compared, fake: FeatureSet, held_out: FeatureSet, pool: Pool
) -> dict[str, float]:
    """Distances of samples to training images. If there is an output, a picture shows the nearest ones."""
    places, others = (spread_out(len(of.thumbnails), QUERIES) for of in (fake, held_out))
    queries = np.concatenate([fake.thumbnails[places], held_out.thumbnails[others]])
    distances, ids = nearest_images(compared.reference, queries, pool)
    mine = distances[: len(places)]
    if config.output:
        first = np.sort(mine.argsort(kind="stable")[:SHOWN])
        kept = choose(compared.samples.rows, config.max_features, config.seed, Choice.FEATURES)[places]
        shown, copied = (
            torch.cat([read_images(index, np.array([one]))[0] for one in some]).permute(0, 2, 3, 1).numpy()
            for index, some in ((compared.samples, kept[first]), (compared.reference, ids[first]))
        )
        picture = draw.file_of(lambda path: draw.save_nearest(shown, copied, path, min(len(shown), 16)))
        storage.write_atomic(storage.join(config.output, "nearest.png"), picture)
    return memorised(mine, distances[len(places) :])


def compare_features(config: EvaluateConfig, real: FeatureSet, fake: FeatureSet) -> dict[str, float]:
    """Metrics by name. `*_images` is the number of `fake` images that a metric covers, if it may not cover all."""
    metrics: dict[str, float] = {}
    if "frechet" in config.metrics:
        metrics["frechet_distance"] = frechet_distance(real.moments, fake.moments)
    if "kernel" in config.metrics:
        found = kernel_distance(
            real.features, fake.features, subset_size=config.kernel_subset_size, seed=config.seed
        )
        metrics["kernel_distance"], metrics["kernel_distance_stderr"], metrics["kernel_distance_images"] = (
            found
        )
    if "precision_recall" in config.metrics:
        metrics["precision"], metrics["recall"] = precision_recall(
            real.features, fake.features, config.precision_recall_neighbours
        )
        metrics["precision_recall_images"] = len(fake.features)
    if "knn" in config.metrics and _labelled(real, fake):
        metrics["knn_label_accuracy"] = knn_label_accuracy(
            real.thumbnails, real.labels, fake.thumbnails, fake.labels, config.knn_neighbours
        )
        metrics["knn_label_accuracy_images"] = len(fake.labels)
    return metrics


def _labelled(*sides: FeatureSet) -> bool:
    """True if all images of the sides have a label."""
    return min(of.labels.min() for of in sides) >= 0
