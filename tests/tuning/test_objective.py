"""Objectives of trials: common random numbers, and division of the measurement among training workers."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cluster.pool import in_process
from pipeline.config import DiffusionConfig
from pipeline.data.index import DatasetIndex, open_dataset
from pipeline.evaluation.bits import held_out_bits, values_that_occur
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.config import BITS_PER_DIM, FRECHET
from pipeline.evaluation.features import ClassifierExtractor, measure
from pipeline.evaluation.frechet import Moments, frechet_distance, moments_of
from pipeline.evaluation.work import choose
from pipeline.models.sampling import sample_images
from pipeline.rng import Choice
from pipeline.tuning.objective import (
    Both,
    HeldOutBits,
    SampleFrechet,
    common_numbers_gain,
    over_ranks,
    paired,
)
from tests.evaluation.common import DIGITS, small_model
from tests.tuning.gaussian import measured_bound


@pytest.fixture(scope="module")
def held_out(digits: Path) -> DatasetIndex:
    return open_dataset(str(digits), "validation")


@pytest.mark.slow
def test_held_out_bits_are_those_of_an_evaluation(held_out: DatasetIndex) -> None:
    model, spec = small_model()
    ids = choose(held_out.rows, 50, 4, Choice.BOUND)
    for terms in (0, 8, 100):
        mine = HeldOutBits(held_out, ids, terms, seed=4)(model, spec, in_process)
        theirs = held_out_bits(model, spec, held_out, ids, terms=0 if terms == 100 else terms, seed=4)
        assert mine.metrics[BITS_PER_DIM] == pytest.approx(theirs.bits_per_dim, rel=1e-6)
        assert mine.metrics[f"{BITS_PER_DIM}_stderr"] == pytest.approx(theirs.stderr, rel=1e-5)
        assert np.mean(mine.per_image) == pytest.approx(theirs.bits_per_dim, rel=1e-5)


def test_the_decoder_that_all_trials_share_takes_the_place_of_each_models_own(
    held_out: DatasetIndex, digits: Path
) -> None:
    model, spec = small_model()
    ids = choose(held_out.rows, 20, 4, Choice.BOUND)
    occurs = values_that_occur(open_dataset(str(digits)))
    assert occurs.nonzero().ravel().tolist() == sorted({round(level * 255 / 16) for level in range(17)})
    for terms in (8, 100):
        mine = HeldOutBits(held_out, ids, terms, 4, occurs)(model, spec, in_process)
        theirs = held_out_bits(
            model, spec, held_out, ids, terms=0 if terms == 100 else terms, seed=4, occurs=occurs
        )
        assert theirs.softmax is not None
        found = (mine.metrics[BITS_PER_DIM], mine.metrics[f"{BITS_PER_DIM}_stderr"])
        assert found == pytest.approx(theirs.softmax[:2], rel=1e-5)
        assert theirs.softmax[0] < theirs.bits_per_dim


def test_the_frechet_distance_is_that_of_the_samples_numbered_from_0(digits: Path) -> None:
    model, spec = small_model(conditional=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        extractor = ClassifierExtractor(Classifier(DIGITS).eval().requires_grad_(False))
    (real,) = measure([open_dataset(str(digits))], extractor, keep=1)
    objective = SampleFrechet(extractor, real.moments, samples=96, steps=5, seed=3)
    found = objective(model, spec, in_process)
    images = torch.cat(
        [
            sample_images(model, spec, ids, sampler="ddim", eta=1.0, sampling_steps=5, seed=3)
            for ids in torch.arange(96).split(64)
        ]
    )
    features = extractor.load(torch.device("cpu"))(images).numpy()
    assert found.metrics[FRECHET] == pytest.approx(
        frechet_distance(real.moments, moments_of(features)), rel=1e-4
    )
    assert found.per_image == ()


def test_samples_or_features_that_are_not_numbers_have_no_distance() -> None:
    model, spec = small_model(conditional=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = Classifier(DIGITS).eval().requires_grad_(False)
    width = len(net.features(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))[0])
    reference = Moments(9, np.zeros(width), np.eye(width))
    objective = SampleFrechet(ClassifierExtractor(net), reference, samples=96, steps=5, seed=3)
    assert math.isfinite(objective(model, spec, in_process).metrics[FRECHET])
    broken = copy.deepcopy(model)
    next(broken.parameters()).fill_(math.nan)
    assert math.isnan(objective(broken, spec, in_process).metrics[FRECHET])
    next(net.parameters()).fill_(math.nan)
    assert math.isnan(objective(model, spec, in_process).metrics[FRECHET])


def test_both_objectives_are_measured_in_one_go(digits: Path, held_out: DatasetIndex) -> None:
    model, spec = small_model(conditional=False)
    extractor = ClassifierExtractor(Classifier(DIGITS).eval().requires_grad_(False))
    (real,) = measure([open_dataset(str(digits))], extractor, keep=1)
    bits = HeldOutBits(held_out, np.arange(8), 4, 0)
    found = Both((bits, SampleFrechet(extractor, real.moments, 64, 2, 0)))(model, spec, in_process)
    assert set(found.metrics) == {BITS_PER_DIM, f"{BITS_PER_DIM}_stderr", FRECHET}
    assert len(found.per_image) == 8


def test_one_worker_does_every_task_in_order(held_out: DatasetIndex) -> None:
    model, spec = small_model()
    objective = HeldOutBits(held_out, np.arange(130), 4, 0)
    alone = objective(model, spec, over_ranks(torch.device("cpu"), 0, 1))
    assert alone == objective(model, spec, in_process)


def test_common_random_numbers_tell_two_schedules_apart_with_fewer_images() -> None:
    cosine, linear = (
        measured_bound(DiffusionConfig(schedule=name, timesteps=40, variance="fixed_large"), images=256)
        for name in ("cosine", "linear")
    )
    other = measured_bound(
        DiffusionConfig(schedule="linear", timesteps=40, variance="fixed_large"), images=256, seed=1
    )
    gain = common_numbers_gain(cosine, linear)
    print(
        f"factor gained by common random numbers: {gain:.1f}; with numbers of its own each: "
        f"{common_numbers_gain(cosine, other):.1f}"
    )
    assert gain > 3
    assert common_numbers_gain(cosine, other) == pytest.approx(1, abs=0.3)
    difference, error = paired(linear, cosine)
    assert error < 0.6 * np.hypot(cosine.std(ddof=1), linear.std(ddof=1)) / 16
    assert difference > 4 * error
