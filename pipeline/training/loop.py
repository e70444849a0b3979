"""The training loop of one worker, and the observer that it reports to. Plain torch, no Ray."""

import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pipeline.config import ModelSpec, TrainConfig
from pipeline.data.batch import Batch
from pipeline.errors import BadSettings
from pipeline.training.meter import Meter
from pipeline.training.state import TrainState
from pipeline.training.step import Outcome, gather_by_id, learning_rate, make_backward, train_step


class NonFinite(RuntimeError):
    """The loss or the gradient of a step is not finite. That step left weights and optimizer unchanged.

    Attributes:
        step: number of the step, counted from 1.
        samples: id, epoch, timestep and loss of each sample in the global batch, in the order of the ids.
    """

    def __init__(self, step: int, samples: list[dict[str, float]]) -> None:
        ids = ", ".join(str(sample["id"]) for sample in samples[:8])
        super().__init__(f"step {step}: the loss or its gradient is not finite (samples {ids}, …)")
        self.step, self.samples = step, samples


class Observer:
    """Receives a run's reports and can stop it. Every worker calls it in the same way. This base class does nothing."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Receives the figures of a logging interval."""

    def save(self) -> None:
        """Saves a checkpoint of the state."""

    def should_stop(self) -> bool:
        """Returns True to end the run before its next step. Every worker must get the same answer."""
        return False

    def skipped(self, error: NonFinite) -> None:
        """Receives the error of a step that was skipped because it was not finite."""


def train(
    config: TrainConfig,
    spec: ModelSpec,
    state: TrainState,
    model: nn.Module,
    batches: Iterator[Batch],
    meter: Meter,
    observer: Observer,
) -> None:
    """Trains `state` in place until `config.steps`, or until the observer stops the run.

    Args:
        model: `state.model` in the form that a step calls; see `network.wrap`.
        batches: this worker's part of the global batches, from `state.step` on.
        meter: sums up the figures that are logged.
        observer: receives figures, checkpoints and skipped steps.

    Raises:
        NonFinite: a step was not finite, without `skip_nonfinite`.
        BadSettings: `max_skipped_in_a_row` steps in a row were skipped.
    """
    run_backward = make_backward(config, spec, model, meter.device, meter.world_size)
    lag = 1 if meter.device.type == "cuda" else 0
    unchecked: deque[tuple[Outcome, Callable[[], bool]]] = deque()

    def check(left: int) -> None:
        """Checks that the steps were finite, all but the last `left`."""
        while len(unchecked) > left:
            outcome, is_finite = unchecked.popleft()
            if is_finite():
                meter.skipped_in_a_row = 0
                continue
            error = _non_finite(outcome, meter.world_size)
            if not config.skip_nonfinite:
                raise error
            observer.skipped(error)
            meter.skipped_in_a_row += 1
            if meter.skipped_in_a_row >= config.max_skipped_in_a_row:
                raise BadSettings(
                    f"{error}: skipped {meter.skipped_in_a_row} steps in a row, the limit of --max-skipped-in-a-row, "
                    "and the weights are those before them: resume with a smaller --learning-rate"
                )

    state.model.train()
    while state.step < config.steps and not observer.should_stop():
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        outcome = train_step(config, spec, state, run_backward, batch, meter.device, meter.world_size)
        meter.add(outcome, waited)
        unchecked.append((outcome, _look_later(outcome.finite)))
        logs, saves = (
            state.step == config.steps or state.step % every == 0
            for every in (config.log_every, config.checkpoint_every)
        )
        check(0 if logs or saves else lag)
        if logs:
            observer.log(state.step, meter.read(learning_rate(config, state.step - 1)))
        if saves:
            observer.save()
    check(0)


def _look_later(flag: Tensor) -> Callable[[], bool]:
    """Returns a function that reads a flag on the device and waits for no work that is queued after this call."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    copied = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def look() -> bool:
        event.synchronize()
        return bool(copied)

    return look


def _non_finite(outcome: Outcome, world_size: int) -> NonFinite:
    """The error of a step, with the samples of all workers. A collective call."""
    batch = outcome.batch
    columns = gather_by_id(batch.ids, batch.epochs, outcome.t, outcome.losses, world_size)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    keys = ("id", "epoch", "timestep", "loss")
    return NonFinite(outcome.step, [dict(zip(keys, row, strict=True)) for row in rows])
