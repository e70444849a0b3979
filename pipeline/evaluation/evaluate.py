"""All that can be said of a model in numbers: held-out bits/dim, and how its samples compare with real images."""

import csv
import dataclasses
import io
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline import storage
from pipeline.cluster.pool import ActorPool, Pool
from pipeline.config import ModelSpec
from pipeline.data.index import DatasetIndex, Splits, open_splits
from pipeline.errors import InputError
from pipeline.evaluation.bits import BitsPerDim, held_out_bits
from pipeline.evaluation.classifier import save_classifier, train_classifier
from pipeline.evaluation.config import EvaluateConfig, Metric, check
from pipeline.evaluation.features import ClassifierExtractor, Extractor, FeatureSet, measure, open_extractor
from pipeline.evaluation.frechet import frechet_distance
from pipeline.evaluation.kernel import LEAST_IMAGES, kernel_distance
from pipeline.evaluation.neighbours import knn_label_accuracy, precision_recall
from pipeline.evaluation.reading import open_samples
from pipeline.evaluation.work import choose
from pipeline.models.export import Packed, load_model, save_model
from pipeline.models.snapshots import posthoc_ema
from pipeline.models.unet import UNet
from pipeline.output import check_apart, to_json
from pipeline.pictures import draw


def evaluate(config: EvaluateConfig, model_folder: str | Path | Packed) -> dict[str, float]:
    """Measures a model over the cluster.

    Args:
        model_folder: the model that `config.model` names (path, URI, or packed); "" = none is measured.

    Returns:
        the metrics by name. `*_real` is what the held-out real images get where the samples would stand: no model
        need be better. Fréchet distances shrink as the images on a side grow: compare equal counts.

    Raises:
        InputError: a setting, model, dataset or file that can't be used.
    """
    check(config)
    renamed: dict[Metric, Metric] = {"manifold": "precision_recall"}
    config = replace(config, metrics=tuple(renamed.get(name, name) for name in config.metrics))
    if config.output:
        check_apart(config.output, "--data", config.data)
        storage.check_writable(config.output)
    pool = ActorPool(config.actors, config.gpu)
    # Only the bound looks at the model; images of a folder that was not prepared are read at its size.
    loaded = load_model(model_folder) if model_folder else None
    wanted = ("all",) if "test" in (config.split, config.reference_split) else ()
    splits = open_splits(config.data, loaded[1].image.size if loaded else 0, config.reading, wanted)
    held_out = splits[config.split]
    metrics: dict[str, float] = {}
    if loaded and "bits" in config.metrics:
        metrics |= _bits(config, *loaded, held_out, pool)
    if config.samples and set(config.metrics) - {"bits"}:
        metrics |= _quality(config, splits, pool)
    _write(config, "metrics.json", to_json(metrics, indent=1).encode())
    return metrics


def _bits(
    config: EvaluateConfig, model: UNet, spec: ModelSpec, held_out: DatasetIndex, pool: Pool
) -> dict[str, float]:
    ids = choose(held_out.rows, config.max_images, config.seed)
    averages = posthoc_ema(model, config.snapshots, config.ema_lengths) if config.ema_lengths else []

    def bound() -> BitsPerDim:
        return held_out_bits(
            model,
            spec,
            held_out,
            ids,
            terms=config.terms,
            seed=config.seed,
            batch_size=config.batch_size,
            pool=pool,
        )

    bits = bound()
    _write_bits(config, bits)
    sweep: dict[str, float] = {}
    for length, weights in zip(config.ema_lengths, averages, strict=True):
        model.load_state_dict(weights)
        sweep[f"bits_per_dim_ema_{length:g}"] = bound().bits_per_dim
        if config.output:
            about = replace(spec, provenance=spec.provenance | {"ema_length": length})
            save_model(storage.join(config.output, f"ema-{length:g}"), weights, about)
    return sweep | {
        "bits_per_dim": bits.bits_per_dim,
        "bits_per_dim_stderr": bits.stderr,
        "bits_per_dim_terms_stderr": bits.terms_stderr,
        "bits_per_dim_images": bits.images,
        "L_T": bits.prior,
        "L_0": bits.decoder,
    }


def _quality(config: EvaluateConfig, splits: Splits, pool: Pool) -> dict[str, float]:
    held_out, reference = splits[config.split], splits[config.reference_split]
    samples = open_samples(config.samples, reference.image)
    sets = [reference, samples] + [held_out] * (config.split != config.reference_split)
    _check_counts(config, sets)
    extractor, metrics = _extractor(config, reference, held_out, pool)
    real, fake, *others = measure(sets, extractor, keep=config.max_features, seed=config.seed, pool=pool)
    metrics |= {"samples": samples.rows} | _compare(config, real, fake)
    for other in others:
        yardstick = _compare(config, real, other)
        metrics |= {"samples_real": held_out.rows} | {
            f"{name}_real": value for name, value in yardstick.items()
        }
    return metrics


def _check_counts(config: EvaluateConfig, sets: list[DatasetIndex]) -> None:
    """Before the work, not after it."""
    least = {
        "frechet": 2,
        "kernel": LEAST_IMAGES,
        "precision_recall": config.precision_recall_neighbours + 1,
        "knn": config.knn_neighbours,
    }
    for index in sets:
        rows = min(index.rows, config.max_features or index.rows)
        for metric in config.metrics:
            if rows < least.get(metric, 0):
                raise InputError(
                    f"--metrics {metric} needs at least {least[metric]} images a side, the {index.split} of "
                    f"{index.uri} give {rows}: give more, or leave it out"
                )


def _compare(config: EvaluateConfig, real: FeatureSet, fake: FeatureSet) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if "frechet" in config.metrics:
        metrics["frechet_distance"] = frechet_distance(real.moments, fake.moments)
    if "kernel" in config.metrics:
        metrics["kernel_distance"], metrics["kernel_distance_stderr"] = kernel_distance(
            real.features, fake.features, subset_size=config.kernel_subset_size, seed=config.seed
        )
    if "precision_recall" in config.metrics:
        metrics["precision"], metrics["recall"] = precision_recall(
            real.features, fake.features, config.precision_recall_neighbours
        )
    if "knn" in config.metrics and min(real.labels.min(), fake.labels.min()) >= 0:
        metrics["knn_label_accuracy"] = knn_label_accuracy(
            real.thumbnails, real.labels, fake.thumbnails, fake.labels, config.knn_neighbours
        )
    return metrics


def _extractor(
    config: EvaluateConfig, reference: DatasetIndex, held_out: DatasetIndex, pool: Pool
) -> tuple[Extractor, dict[str, float]]:
    """The extractor, and what is to be said of it."""
    if config.features == "classifier":
        net, accuracy = train_classifier(
            reference, held_out, seed=config.seed, steps=config.classifier_steps, pool=pool
        )
        if config.output:
            save_classifier(storage.join(config.output, "classifier"), net, reference.image, accuracy)
    else:
        return open_extractor(config.features, reference.image)
    return ClassifierExtractor(net), {"classifier_accuracy": accuracy}


def _write_bits(config: EvaluateConfig, bits: BitsPerDim) -> None:
    _write(config, "bits_per_dim.json", to_json(dataclasses.asdict(bits), indent=1).encode())
    if not bits.terms:
        return
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["term", "bits_per_dim"])
    rows.writerows([(f"L_{t}", repr(term)) for t, term in enumerate(bits.terms)])
    rows.writerow([f"L_{len(bits.terms)}", repr(bits.prior)])
    _write(config, "terms.csv", table.getvalue().encode())
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "terms.png"
        draw.save_bound_terms(np.array(bits.terms), picture)
        _write(config, "terms.png", picture.read_bytes())


def _write(config: EvaluateConfig, name: str, data: bytes) -> None:
    if config.output:
        storage.write_atomic(storage.join(config.output, name), data)
