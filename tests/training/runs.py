"""Training runs of one worker in this process, without Ray Train."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.config import ModelSpec, TrainConfig
from pipeline.data.index import open_splits
from pipeline.data.stream import PlannedData, share
from pipeline.evaluation.reading import read_images
from pipeline.training import checkpoint, loop
from pipeline.training.checks import check, make_spec
from pipeline.training.meter import Meter
from pipeline.training.state import TrainState, new_state
from tests.training.common import planned


class Recorder(loop.Observer):
    """Keeps the loss curve and passes the content of each checkpoint to `save`."""

    def __init__(self, state: TrainState, save: Callable[[checkpoint.Saved], None]) -> None:
        self.losses: dict[int, float] = {}
        self._state, self._save = state, save

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.losses[step] = metrics["loss"]

    def save(self) -> None:
        self._save(checkpoint.capture(self._state))


@dataclass(frozen=True)
class Undisturbed:
    """The result of a run that nothing disturbs.

    Attributes:
        losses: logged losses by step.
        end: the content of a last checkpoint.
    """

    spec: ModelSpec
    losses: dict[int, float]
    end: checkpoint.Saved


def undisturbed(
    config: TrainConfig,
    save: Callable[[checkpoint.Saved], None] = lambda saved: None,
    start: checkpoint.Saved | None = None,
) -> Undisturbed:
    """Run one worker's loop in this process on the images of `config.data`, from the checkpoint `start` if given."""
    index, cpu = open_splits(config.data)["train"], torch.device("cpu")
    plan = index.plan(config.seed, config.batch_size)
    images, labels = read_images(index, np.arange(index.rows))
    spec = make_spec(config, index)
    state = new_state(config, spec, cpu)
    if start:
        checkpoint.restore(state, start)
    recorder, stream = Recorder(state, save), planned(plan, images, labels, range(state.step, config.steps))
    loop.train(config, spec, state, state.model, stream, Meter(config, 1, cpu), recorder)
    return Undisturbed(spec, recorder.losses, checkpoint.capture(state))


def train_here(config: TrainConfig) -> Any:
    """Run one worker's loop in this process, with Ray Data reading as in a real run. Return what the meter has seen."""
    data, spec = check(config)
    index, cpu = data["train"], torch.device("cpu")
    planned = share(index, index.plan(config.seed, config.batch_size))
    (parts,) = PlannedData(config.readers, config.random_crop).configure({"train": planned}, 1)
    state, meter = new_state(config, spec, cpu), Meter(config, 1, cpu)
    with closing(parts["train"].batches(0, config.steps)) as batches:
        loop.train(config, spec, state, state.model, batches, meter, loop.Observer())
    assert state.step == config.steps
    return meter.state()["seen"]
