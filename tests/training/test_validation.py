"""The best checkpoint has the lowest finite figure so far. Figures of samples are logged beside it."""

import json
from pathlib import Path

import pytest
import ray
import ray.train
import torch

from pipeline.data.index import open_splits
from pipeline.errors import InputError
from pipeline.evaluation.classifier import Classifier, save_classifier
from pipeline.training import checkpoint
from pipeline.training.checks import make_spec
from pipeline.training.run_channel import open_channel
from pipeline.training.state import new_state
from pipeline.training.validation import Validator
from tests.training.digit_runs import settings


def test_what_is_not_a_number_is_never_the_best(cluster: None, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "digits").symlink_to(digits)
    config = settings(tmp_path, str(tmp_path), validation_images=4, validation_terms=2)
    splits = open_splits(str(digits))
    spec = make_spec(config, splits["train"])
    validator = Validator(config, spec, splits["validation"], str(tmp_path), open_channel({}))
    call = ray.remote(lambda path, step: validator(ray.train.Checkpoint(path), step=step))

    def best(step: int, add: float) -> tuple[int, float]:
        """Validate a checkpoint with changed weights. Return step and figure of the best one afterwards."""
        state = new_state(config, spec, torch.device("cpu"))
        state.step = step
        for average in state.averages[0]:
            average.add_(add)
        path = tmp_path / "checkpoints" / checkpoint.new_name(step)
        checkpoint.write(str(path), checkpoint.capture(state), {})
        try:
            ray.get(call.remote(str(path), step))
        finally:
            found = json.loads((tmp_path / "best" / "config.json").read_text())["provenance"]
        return found["steps"], found["bits_per_dim"]

    first = best(1, 0.0)
    for step, value in ((2, float("nan")), (3, float("inf"))):
        with pytest.raises(InputError, match=r"its bits/dim are (nan|inf)"):
            best(step, value)
    assert best(4, 0.05) == first  # it is worse


def test_figures_of_samples_are_posted_with_the_bound_and_are_the_same_for_the_same_weights(
    cluster: None, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "digits").symlink_to(digits)
    splits, channel = open_splits(str(digits)), open_channel({})
    image, features = splits["train"].image, str(tmp_path / "classifier")
    save_classifier(features, Classifier(image), image, 0.5)
    config = settings(
        tmp_path, str(tmp_path), validation_images=4, validation_terms=2, validation_samples=24,
        validation_features=features, validate_metrics=("bits", "frechet", "precision_recall"),
    )  # fmt: skip
    spec = make_spec(config, splits["train"])
    validator = Validator(config, spec, splits["validation"], str(tmp_path), channel, splits["train"])
    call = ray.remote(lambda path, step: validator(ray.train.Checkpoint(path), step=step))
    for step in (1, 2):
        state = new_state(config, spec, torch.device("cpu"))
        state.step = step
        path = tmp_path / "checkpoints" / checkpoint.new_name(step)
        checkpoint.write(str(path), checkpoint.capture(state), {})
        ray.get(call.remote(str(path), step))
    _, messages = ray.get(channel.take.remote(0))
    first, second = (values for _, _, values in messages.points)
    assert first == second
    assert first.keys() > {"bits_per_dim", "frechet_distance", "precision", "recall", "validation_samples"}
