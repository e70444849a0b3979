"""Figures of a checkpoint's samples equal an evaluation's and are the same every time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.cluster.pool import in_process
from pipeline.data.index import open_splits
from pipeline.errors import InputError
from pipeline.evaluation import classifier
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.reading import read_images
from pipeline.models.unet import UNet
from pipeline.training import sample_figures as figures
from tests.evaluation.common import small_model, write_samples
from tests.training.digit_runs import settings

STEPS = 40
METRICS = ("bits", "frechet", "kernel", "precision_recall", "cas")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output in which what is made of real images stays from test to test."""
    return tmp_path_factory.mktemp("figures")


@pytest.fixture
def measure(digits: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(figures, "CLASSIFIER_STEPS", STEPS)
    splits = open_splits(str(digits))
    model, spec = small_model()

    def run(net: UNet = model, output: Path = folder, **changes: Any) -> dict[str, float]:
        given = {"validate_metrics": METRICS, "validation_samples": 40} | changes
        config = settings(digits.parent, str(output), **given)
        pair = splits["train"], splits["validation"]
        return figures.sample_figures(config, spec, pair, str(output), net, in_process)

    return run


def test_they_are_those_of_an_evaluation_of_the_same_samples(
    measure: Any, digits: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, draw = list[tuple[Tensor, Tensor]](), figures._draw

    def seen(*given: Any) -> tuple[Tensor, Tensor]:
        drawn.append(draw(*given))
        return drawn[-1]

    monkeypatch.setattr(figures, "_draw", seen)
    found = measure()
    images, labels = drawn[0]
    assert images.dtype == torch.uint8
    assert labels.tolist() == [number % 10 for number in range(40)]
    samples = write_samples(tmp_path / "samples", images.permute(0, 2, 3, 1).numpy(), labels.numpy())
    monkeypatch.setattr(evaluation, "ActorPool", lambda *_, **__: in_process)
    config = EvaluateConfig(
        model="", data=str(digits), samples=str(samples), metrics=("frechet", "kernel", "precision_recall", "cas"),
        features=str(folder / "validation" / "classifier"), classifier_steps=STEPS,
    )  # fmt: skip
    expected = evaluation.evaluate(config, "").metrics
    assert found.keys() - {"validation_samples"} <= expected.keys()
    for name in found.keys() - {"validation_samples"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_what_is_made_of_real_images_is_made_once(
    measure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(output=tmp_path)
    reference = tmp_path / "validation" / "reference.npz"
    with monkeypatch.context() as patch:
        for module, name in ((figures, "measure"), (classifier, "train_classifier")):
            patch.setattr(module, name, lambda *_, **__: pytest.fail("made again"))
        assert measure(output=tmp_path) == first
    reference.write_bytes(reference.read_bytes()[:1000])
    assert measure(output=tmp_path) == first


def test_better_samples_have_better_figures(
    measure: Any, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = measure()
    images, labels = read_images(open_splits(str(digits))["validation"], np.arange(150))
    monkeypatch.setattr(figures, "_draw", lambda *_: (images, labels))
    better = measure()
    assert better["frechet_distance"] < worse["frechet_distance"] / 3
    assert better["kernel_distance"] < worse["kernel_distance"] / 3
    assert better["classification_accuracy_score"] > worse["classification_accuracy_score"] + 0.3


def test_samples_that_are_no_numbers_are_refused_in_one_line(measure: Any) -> None:
    model, _ = small_model()
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    with pytest.raises(InputError, match=r"^a sample is not finite"):
        measure(model)


def test_samples_without_classes_have_distances(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "CLASSIFIER_STEPS", 2)
    splits = open_splits(str(digits))
    model, spec = small_model(conditional=False)
    config = settings(
        digits.parent, str(tmp_path), validate_metrics=("bits", "frechet"), validation_samples=20
    )
    pair = splits["train"], splits["validation"]
    found = figures.sample_figures(config, spec, pair, str(tmp_path), model, in_process)
    assert found.keys() == {"frechet_distance", "validation_samples"}
