"""Measures a model: held-out bits/dim, and figures that compare its samples with real images."""

import csv
import dataclasses
import io
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline import storage
from pipeline.cluster.pool import ActorPool, Pool
from pipeline.config import ModelSpec
from pipeline.data import figures
from pipeline.data.index import Splits, open_splits
from pipeline.diffusion.process import make_process
from pipeline.errors import InputError
from pipeline.evaluation.bits import BitsPerDim, held_out_bits, values_that_occur
from pipeline.evaluation.codes import MOST_BYTES, trivial_codes
from pipeline.evaluation.compare import measure_quality
from pipeline.evaluation.compared import open_compared
from pipeline.evaluation.config import EvaluateConfig, Metric, check
from pipeline.evaluation.reading import read_images
from pipeline.evaluation.work import choose
from pipeline.models.export import Packed, load_model, model_fingerprint, save_model
from pipeline.models.snapshots import posthoc_ema
from pipeline.models.unet import UNet
from pipeline.output import check_apart, to_json
from pipeline.pictures import draw
from pipeline.rng import Choice

PICTURES = ("terms.png", "nearest.png")


class Evaluation(NamedTuple):
    """The results of an evaluation.

    Attributes:
        metrics: figures by name. `*_real` is the figure of held-out real images in place of the samples; no model needs
            a better one. Fréchet distances shrink with the number of images, so compare only equal counts.
        on: what the figures of samples were measured on, in words; {} without samples.
        pictures: URIs of the pictures that were drawn.
    """

    metrics: dict[str, float]
    on: dict[str, str]
    pictures: list[str]


def evaluate(config: EvaluateConfig, model_folder: str | Path | Packed) -> Evaluation:
    """Measures a model and its samples over the cluster. Figures of generated samples also go into their dataset card.

    Args:
        model_folder: the model that `config.model` names (path, URI, or packed); "" = measure no model.

    Raises:
        InputError: a setting, the model, the data or a file can't be used.
    """
    check(config)
    renamed: dict[Metric, Metric] = {"manifold": "precision_recall"}
    config = replace(config, metrics=tuple(renamed.get(name, name) for name in config.metrics))
    if config.output:
        check_apart(config.output, "--data", config.data)
        storage.check_writable(config.output)
    pool = ActorPool(config.actors, config.gpu, job="evaluate")
    # Only the bound needs the model, but raw images are resized to the model's size.
    loaded = load_model(model_folder) if model_folder else None
    wanted = ("all",) if "test" in (config.split, config.reference_split) else ()
    splits = open_splits(config.data, loaded[1].image.size if loaded else 0, config.reading, wanted)
    held_out = splits[config.split]
    model = model_fingerprint(model_folder) if model_folder else ""
    compared = (
        open_compared(config, splits, model) if set(config.metrics) - {"bits"} and config.samples else None
    )
    metrics, on = dict[str, float](), dict[str, str]()
    if loaded and "bits" in config.metrics:
        ids = choose(held_out.rows, config.max_images, config.seed, Choice.BOUND)
        metrics |= _bits(config, *loaded, splits, ids, pool)
        codes = _codes(config, splits, ids)
        metrics |= {f"bits_per_dim_{name}": value for name, value in codes.items()}
        print(_in_words(metrics, codes), file=sys.stderr)
    if compared:
        found, on = measure_quality(config, compared, pool), compared.measured_on(config)
        metrics |= found
        _write(config, "measured_on.json", to_json(on, indent=1).encode())
        if compared.samples.fingerprint:  # jobs/generate.py wrote them
            figures.record(compared.samples.uri, compared.samples.fingerprint, found, on)
    _write(config, "metrics.json", to_json(metrics, indent=1).encode())
    written = [storage.join(config.output, name) for name in PICTURES] if config.output else []
    return Evaluation(metrics, on, [uri for uri in written if storage.exists(uri)])


def _bits(
    config: EvaluateConfig, model: UNet, spec: ModelSpec, splits: Splits, ids: np.ndarray, pool: Pool
) -> dict[str, float]:
    held_out = splits[config.split]
    occurs = values_that_occur(splits.indexes.get(config.reference_split, held_out))
    averages = posthoc_ema(model, config.snapshots, config.ema_lengths) if config.ema_lengths else []

    def bound() -> BitsPerDim:
        bits = held_out_bits(
            model,
            spec,
            held_out,
            ids,
            terms=config.terms,
            seed=config.seed,
            batch_size=config.batch_size,
            pool=pool,
            occurs=occurs,
        )
        if not math.isfinite(bits.bits_per_dim):
            raise InputError(
                f"--model {config.model}: its bits/dim are {bits.bits_per_dim}: the weights are so large that the "
                "network's output is not finite: use an earlier checkpoint or another model"
            )
        return bits

    bits = bound()
    _write_bits(config, bits)
    sweep: dict[str, float] = {}
    for length, weights in zip(config.ema_lengths, averages, strict=True):
        model.load_state_dict(weights)
        sweep[f"bits_per_dim_ema_{length:g}"] = bound().bits_per_dim
        if config.output:
            about = replace(spec, provenance=spec.provenance | {"ema_length": length})
            save_model(storage.join(config.output, f"ema-{length:g}"), weights, about)
    return (
        sweep
        | {
            "bits_per_dim": bits.bits_per_dim,
            "bits_per_dim_stderr": bits.stderr,
            "bits_per_dim_terms_stderr": bits.terms_stderr,
            "bits_per_dim_images": bits.images,
            **_softmax(bits),
            "L_T": bits.prior,
            "L_0": bits.decoder,
        }
        | _shares(bits, spec)
    )


def _softmax(bits: BitsPerDim) -> dict[str, float]:
    """The bound with the softmax decoder, which is the same for all models and schedules; {} if it was not measured."""
    if bits.softmax is None:
        return {}
    names = ("bits_per_dim_softmax", "bits_per_dim_softmax_stderr", "L_0_softmax")
    return dict(zip(names, bits.softmax, strict=True))


def _shares(bits: BitsPerDim, spec: ModelSpec) -> dict[str, float]:
    """The sums of the terms L_1 to L_{T-1} before and after the step with equal noise and signal (alpha_bar = 0.5).

    {} if not every term was measured.
    """
    if not bits.terms:
        return {}
    low = int((make_process(spec.diffusion).alpha_bar > 0.5).sum())
    return {"L_low_noise": sum(bits.terms[1:low]), "L_high_noise": sum(bits.terms[max(1, low) :])}


def _codes(config: EvaluateConfig, splits: Splits, measured: np.ndarray) -> dict[str, float]:
    """Bits/dim of the images that the bound is measured on, coded by `trivial_codes`.

    Args:
        measured: ids of those images, int64 [N].
    """
    held_out = splits[config.split]
    reference = splits.indexes.get(config.reference_split, held_out)
    most = max(1, MOST_BYTES // (held_out.image.size**2 * held_out.image.channels))
    ids = choose(reference.rows, min(config.max_features or most, most), config.seed, Choice.CODES)
    train, images = (
        read_images(index, some)[0].permute(0, 2, 3, 1).numpy()
        for index, some in ((reference, ids), (held_out, measured[:most]))
    )
    return trivial_codes(train, images)


def _in_words(metrics: dict[str, float], codes: dict[str, float]) -> str:
    parts = ", ".join(
        f"{name} {metrics[name]:.3f}"
        for name in ("L_0", "L_low_noise", "L_high_noise", "L_T")
        if name in metrics
    )
    others = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in codes.items())
    return (
        f"evaluate: {metrics['bits_per_dim']:.3f} bits/dim ({parts}); {metrics['bits_per_dim_softmax']:.3f} where L_0 is "
        f"a softmax over the values that occur ({metrics['L_0_softmax']:.3f}); "
        f"the same images by codes without a network: {others}"
    )


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
    terms = np.array(bits.terms)
    _write(config, "terms.png", draw.file_of(lambda path: draw.save_bound_terms(terms, path)))


def _write(config: EvaluateConfig, name: str, data: bytes) -> None:
    if config.output:
        storage.write_atomic(storage.join(config.output, name), data)
