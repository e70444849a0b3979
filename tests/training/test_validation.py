"""The best checkpoint: one whose figure is a number, and the lowest so far."""

import json
from pathlib import Path

import pytest
import ray
import ray.train
import torch

from pipeline.data.index import open_splits
from pipeline.errors import InputError
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
        """Validates a checkpoint of changed weights; the step and the figure of the best one afterwards."""
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
    assert best(4, 0.05) == first  # a worse one
