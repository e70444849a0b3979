"""Objectives by which trials are compared; they mean the same for every schedule, T and loss.

Held-out bits/dim is the variational bound on the same images. The Fréchet distance is that of samples drawn with the
same number of model evaluations. All trials use the same images and the same noise (common random numbers), so the
difference of two trials is known more precisely than either value.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import storage
from pipeline.cluster.pool import ActorPool, Pool, Work
from pipeline.config import ModelSpec
from pipeline.data.index import DatasetIndex, Splits
from pipeline.errors import InputError
from pipeline.evaluation.bits import BitsWork, mean_and_error, values_that_occur, with_softmax
from pipeline.evaluation.classifier import CONFIG, WEIGHTS, keep_classifier
from pipeline.evaluation.config import BITS_PER_DIM, FRECHET
from pipeline.evaluation.features import Extractor, measure, open_extractor
from pipeline.evaluation.frechet import Moments, frechet_distance, merge_moments, moments_of
from pipeline.evaluation.work import Partial, choose, cut
from pipeline.models.sampling import preview_floats, to_pixels
from pipeline.models.unet import UNet
from pipeline.rng import Choice
from pipeline.tuning.config import TuneConfig

IMAGES_PER_TASK = 64
CLASSIFIER = "classifier"  # value of --features, and a folder of the search


@dataclass(frozen=True)
class Measured:
    """One measurement; `per_image` as in `ledger.Rung`."""

    metrics: dict[str, float]
    per_image: tuple[float, ...] = ()


class Objective(Protocol):
    """Measures a model. It is pickled and sent to the training workers, within the job."""

    def __call__(self, model: UNet, spec: ModelSpec, pool: Pool) -> Measured: ...


@dataclass(frozen=True)
class HeldOutBits:
    """Bits/dim on the images `ids`, with its standard error over images (and terms).

    Attributes:
        index: the held-out split.
        ids: sample ids, int64 [N].
        terms: number of terms of the bound for each image.
        occurs: bool [256], pixel values that occur in the training images, for the decoder that all schedules share;
            None = each model's own decoder.
    """

    index: DatasetIndex
    ids: np.ndarray
    terms: int
    seed: int
    occurs: Tensor | None = None

    def __call__(self, model: UNet, spec: ModelSpec, pool: Pool) -> Measured:
        """See `Objective`. If T is at most `terms`, every term is evaluated."""
        terms = 0 if self.terms >= spec.diffusion.timesteps else self.terms
        work = BitsWork(self.index, model, spec, terms, self.seed, self.occurs)
        parts = list(pool(work, cut(self.ids, IMAGES_PER_TASK)))
        own = self.occurs is None
        total = np.concatenate([part["total"] for part in parts]) if own else with_softmax(parts)
        mean, stderr = mean_and_error(total)
        metrics = {BITS_PER_DIM: mean, f"{BITS_PER_DIM}_stderr": stderr}
        return Measured(metrics, tuple(total.round(6).tolist()))


@dataclass(frozen=True)
class SampleFrechet:
    """The Fréchet distance from DDIM samples, numbered 0 to `samples`, to the training data.

    Attributes:
        reference: moments of the training data's features.
        steps: model evaluations for each sample, at most T.
    """

    extractor: Extractor
    reference: Moments
    samples: int
    steps: int
    seed: int

    def __call__(self, model: UNet, spec: ModelSpec, pool: Pool) -> Measured:
        """See `Objective`."""
        work = _SampleWork(model, spec, self.steps, self.seed, self.extractor)
        parts = [
            Moments(int(part["count"][0]), part["mean"], part["m2"])
            for part in pool(work, cut(np.arange(self.samples), IMAGES_PER_TASK))
        ]
        merged = merge_moments(parts)
        finite = np.isfinite(merged.mean).all() and np.isfinite(merged.m2).all()
        return Measured({FRECHET: frechet_distance(self.reference, merged) if finite else math.nan})


@dataclass(frozen=True)
class _SampleWork:
    """Moments of the features of samples, for runs of consecutive sample numbers."""

    model: UNet
    spec: ModelSpec
    steps: int
    seed: int
    extractor: Extractor

    def start(self, device: str) -> Callable[[np.ndarray], Partial]:
        """See `pool.Work`."""
        model, embed = self.model.to(device).eval(), self.extractor.load(device)

        @torch.no_grad()
        def do(ids: np.ndarray) -> Partial:
            first, count = int(ids[0]), len(ids)
            samples = preview_floats(model, self.spec, count, first=first, steps=self.steps, seed=self.seed)
            # A sample that is not finite has pixels, but no distance.
            numbers = samples.isfinite().flatten(1).all(dim=1, keepdim=True)
            features = embed(to_pixels(samples)).where(numbers, math.nan)
            moments = moments_of(features.cpu().numpy())
            return {"count": np.array([moments.count]), "mean": moments.mean, "m2": moments.m2}

        return do


@dataclass(frozen=True)
class Both:
    """Several objectives, one after the other."""

    parts: tuple[Objective, ...]

    def __call__(self, model: UNet, spec: ModelSpec, pool: Pool) -> Measured:
        """See `Objective`."""
        results = [part(model, spec, pool) for part in self.parts]
        metrics = {name: value for result in results for name, value in result.metrics.items()}
        return Measured(metrics, next((r.per_image for r in results if r.per_image), ()))


def make_objective(config: TuneConfig, splits: Splits, gpu: bool | None = None) -> Objective:
    """The objective that the settings ask for. Features and reference moments are computed once for all trials.

    Raises:
        InputError: there is no validation split, there are no labels for the classifier, or the features file is
            unusable.
    """
    parts: list[Objective] = []
    if BITS_PER_DIM in config.metrics:
        held_out = splits["validation"]
        ids = choose(held_out.rows, config.max_images, config.seed, Choice.BOUND)
        if len(ids) < 2:
            raise InputError(f"--data {config.data}: fewer than two held-out images")
        occurs = values_that_occur(splits["train"]) if config.decoder == "softmax" else None
        parts.append(HeldOutBits(held_out, ids, config.terms, config.seed, occurs))
    if FRECHET in config.metrics:
        extractor = _extractor(config, splits, gpu)
        (real,) = measure(
            [splits["train"]], extractor, keep=1, seed=config.seed, pool=ActorPool(gpu=gpu, job="tune")
        )
        parts.append(
            SampleFrechet(extractor, real.moments, config.samples, config.sampling_steps, config.seed)
        )
    return parts[0] if len(parts) == 1 else Both(tuple(parts))


def features_digest(features: str) -> str:
    """SHA-256 of the file that --features names; "classifier" for the built-in one, which is kept with the search."""
    if features == CLASSIFIER:
        return features
    place = storage.join(features, WEIGHTS) if storage.exists(storage.join(features, CONFIG)) else features
    return hashlib.sha256(storage.read_bytes(place)).hexdigest()


def _extractor(config: TuneConfig, splits: Splits, gpu: bool | None) -> Extractor:
    """The features of a search. A resume uses the classifier that the first start trained."""
    features, train = config.features, splits["train"]
    if features == CLASSIFIER:
        features = storage.join(config.output, CLASSIFIER)
        pool = ActorPool(1, gpu, job="tune")
        keep_classifier(features, train, splits["validation"], seed=config.seed, pool=pool)
    return open_extractor(features, train.image)[0]


def over_ranks(device: torch.device, rank: int, world_size: int) -> Pool:
    """A pool in which each training worker does its share of the tasks, and every worker gets all results."""

    def pool(work: Work, tasks: Sequence[np.ndarray], title: str = "") -> Iterator[Partial]:
        do = work.start(str(device))
        parts: list[list[Partial]] = [[] for _ in range(world_size)]
        parts[rank] = [do(task) for task in tasks[rank::world_size]]
        if world_size > 1:
            dist.all_gather_object(parts, parts[rank])
        return (parts[i % world_size][i // world_size] for i in range(len(tasks)))

    return pool


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The mean of a - b over the same images, and its standard error."""
    difference = np.asarray(a) - np.asarray(b)
    return mean_and_error(difference)


def common_numbers_gain(a: Sequence[float], b: Sequence[float]) -> float:
    """(Var(a) + Var(b)) / Var(a - b): how many times fewer images common random numbers need to compare two trials."""
    x, y = np.asarray(a), np.asarray(b)
    return float((x.var(ddof=1) + y.var(ddof=1)) / (x - y).var(ddof=1))
