"""The training loop inside a Ray Train worker: process group, stream, checkpoints."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import ray
import ray.train
import ray.train.collective
import ray.train.torch
from safetensors.torch import save as pack

from pipeline import storage
from pipeline.config import ModelSpec, TrainConfig
from pipeline.data.batch import Batch
from pipeline.data.stream import RankStream
from pipeline.errors import BadSettings, InputError
from pipeline.models.snapshots import Snapshot
from pipeline.tracking import RUN_FILE, Point
from pipeline.training import checkpoint, flops, loop, network
from pipeline.training.agreement import Agreement
from pipeline.training.checkpoint_manager import CHECKPOINTS, CheckpointManager
from pipeline.training.gauges import RunGauges
from pipeline.training.meter import Meter
from pipeline.training.run_channel import Command, PatientOnChannel
from pipeline.training.state import TrainState, new_state
from pipeline.training.step import learning_rate

SNAPSHOTS = "snapshots"


class Watch(Protocol):
    """Looks at the training state between two steps, on every worker. The job sends it to its workers by pickle."""

    def __call__(self, state: TrainState, rank: int, world_size: int) -> bool:
        """Returns True to end the run here, as after its last step. All workers must return the same."""


@dataclass(frozen=True)
class Hooks:
    """Additions of a caller of `trainer.train` (see pipeline.tuning).

    Attributes:
        watch: called before each step and after the last one.
    """

    watch: Watch | None = None


@dataclass(frozen=True)
class Task:
    """The driver's message to every worker.

    Args:
        output: URI of the run.
        channel: handle of the run's `RunChannel`.
        run_id: id of the MLflow run.
        rows: number of samples in an epoch.
    """

    config: TrainConfig
    spec: ModelSpec
    output: str
    channel: Any
    run_id: str
    rows: int
    hooks: Hooks


def train_loop_per_worker(settings: dict[str, Task]) -> None:
    """The function that Ray Train runs on every worker."""
    task = settings["task"]
    # Ray Train restarts the workers after any error. If a restart can't help, the run ends here instead.
    try:
        if ray.get(task.channel.reason_to_give_up.remote()):
            return
        _run(task)
    except ray.exceptions.ActorDiedError:
        return  # the channel died, so another driver has taken over the run
    except InputError as error:
        ray.get(task.channel.give_up.remote(error))
        raise
    except loop.NonFinite as error:
        reason = f"{error}; all ids are in {_nonfinite_file(error)} of the output, and the last checkpoint is intact"
        advice = "resume with a smaller --learning-rate, or pass --skip-nonfinite"
        ray.get(task.channel.give_up.remote(BadSettings(f"{reason}: {advice}")))
        raise


def _run(task: Task) -> None:
    """Builds the training state, restores it, trains."""
    config, spec, hooks = task.config, task.spec, task.hooks
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    say = task.channel.phase.remote if rank == 0 else lambda what: None
    say("building the model")
    _check_shared(task)
    network.prepare_device(config, device)
    state = new_state(config, spec, device)
    peak = config.peak_tflops * 1e12 or flops.peak_flops(device, network.uses_bf16(config, device))
    meter = Meter(config, world_size, device, flops.flops_per_image(state.model, spec.image.size), peak)
    run = RunObserver(task, state, meter, rank)

    run.restore()
    # Images are read and decoded from here on, while the model is prepared.
    stream = cast(RankStream, ray.train.get_dataset_shard("train"))
    batches = stream.batches(
        state.step, config.steps, pin=device.type == "cuda", on_bad=task.channel.quarantine.remote
    )
    with contextlib.closing(batches):
        model = network.wrap(config, state.model, world_size, device)
        run.begin()
        say("reading the first batch")
        first = "compiling the network for the first step" if config.compile else "making the first steps"
        try:
            loop.train(config, spec, state, model, _at_first(batches, lambda: say(first)), meter, run)
        except (InputError, loop.NonFinite) as error:
            run.fail(error)
            raise
    if hooks.watch is not None and state.step == config.steps:
        hooks.watch(state, rank, world_size)
    run.finish()


def _at_first(batches: Iterator[Batch], call: Callable[[], object]) -> Iterator[Batch]:
    """Yields the same batches, and calls `call` when the first one arrives."""
    for number, batch in enumerate(batches):
        if number == 0:
            call()
        yield batch


class RunObserver(loop.Observer):
    """Connects one worker's loop to the run: checkpoints, curves, the driver's commands and the caller's watch.

    Args:
        rank: this worker's rank.
    """

    def __init__(self, task: Task, state: TrainState, meter: Meter, rank: int) -> None:
        config = task.config
        self._task, self._state, self._meter, self._rank = task, state, meter, rank
        self._points: list[Point] = []
        self._saved_step = -1
        self._gauges = RunGauges(task.run_id) if rank == 0 else None
        self._manager = CheckpointManager(
            storage.join(task.output, CHECKPOINTS),
            rank,
            meter.device,
            task.channel,
            PatientOnChannel(task.channel, config.storage_patience),
            validate=lambda step: is_validated(config, step),
            on_write=lambda saved: keep_snapshots(storage.join(task.output, SNAPSHOTS), config, saved),
        )

    def restore(self) -> None:
        """Loads the newest intact checkpoint into the state and the meter."""
        task = self._task
        if found := self._manager.restore():
            saved, kept = found
            checkpoint.restore(self._state, saved)
            self._meter.restore(kept, self._rank)
            if self._rank == 0:  # the driver may have been killed before it delivered them
                task.channel.post_points.remote([tuple(point) for point in kept["points"]])
        self._saved_step = self._state.step

    def begin(self) -> None:
        """Tells the driver that the steps begin, and listens for its commands from now on."""
        world_size = self._meter.world_size
        self._agreement = Agreement(world_size)
        self._commands = (
            CommandListener(self._task.channel, self._state.step, world_size) if self._rank == 0 else None
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """See `loop.Observer`."""
        if self._gauges:
            self._gauges.logged(step, metrics)
            point = (int(time.time() * 1000), step, metrics | {"workers": self._meter.world_size})
            self._points.append(point)
            self._task.channel.post_points.remote([point])

    def save(self) -> None:
        """See `loop.Observer`."""
        step = self._state.step
        if self._manager.save(self._capture, step, self._facts(), needed=step == self._task.config.steps):
            self._points.clear()
            self._saved_step = step
            if self._gauges:
                self._gauges.saved()

    def finish(self) -> None:
        """Saves the last step, unless it is saved already."""
        step = self._state.step
        saved = ray.train.collective.broadcast_from_rank_zero(self._saved_step == step)
        if not saved:
            self._manager.save(self._capture, step, self._facts(), needed=True)

    def should_stop(self) -> bool:
        """See `loop.Observer`."""
        watch = self._task.hooks.watch
        if watch is not None and watch(self._state, self._rank, self._meter.world_size):
            return True
        command = self._agreement(self._commands() if self._commands else Command.NOTHING)
        if command == Command.SAVE:
            self._manager.save_now(self._capture, self._state.step, self._facts())
        return command == Command.STOP

    def skipped(self, error: loop.NonFinite) -> None:
        """See `loop.Observer`."""
        if self._rank == 0:
            self._task.channel.post_file.remote(_nonfinite_file(error), _nonfinite_record(error))
            self._task.channel.notice.remote(f"{error}: skipped; all ids are in {_nonfinite_file(error)}")

    def fail(self, error: Exception) -> None:
        """Waits for the last checkpoint, and keeps the samples of a step that was not finite."""
        self._manager.flush()
        if self._rank == 0 and isinstance(error, loop.NonFinite):
            ray.get(self._task.channel.post_file.remote(_nonfinite_file(error), _nonfinite_record(error)))

    def _capture(self) -> checkpoint.Saved:
        return checkpoint.capture(self._state)

    def _facts(self) -> dict[str, Any]:
        config, step = self._task.config, self._state.step
        return {
            "run_id": self._task.run_id,
            "position": position(config, step, self._task.rows),
            "learning_rate": learning_rate(config, step),
            **self._meter.state(),
            "points": list(self._points),
        }


class CommandListener:
    """Receives the driver's commands on rank 0 without waiting.

    Args:
        channel: handle of the run's `RunChannel`.
        step: step from which this worker group continues.
        workers: number of workers in the group.
    """

    def __init__(self, channel: Any, step: int, workers: int) -> None:
        self._channel = channel
        self._next = channel.next_command.remote(ray.get(channel.begin.remote(step, workers)))

    def __call__(self) -> Command:
        if not ray.wait([self._next], timeout=0)[0]:
            return Command.NOTHING
        command, seen = ray.get(self._next)
        self._next = self._channel.next_command.remote(seen)
        return Command(command)


def is_validated(config: TrainConfig, step: int) -> bool:
    """True if the checkpoint at a step is validated: every `validate_every`-th, and the last one."""
    if not config.validate_every:
        return False
    return step == config.steps or step % (config.validate_every * config.checkpoint_every) == 0


def keep_snapshots(folder: str, config: TrainConfig, saved: checkpoint.Saved) -> None:
    """Writes the power-function averages to `folder`, where they outlive their checkpoint (see `models.snapshots`)."""
    options = config.optimizer
    lengths = saved.averages[len(options.ema_decays) :]
    for length, average in zip(options.ema_lengths, lengths, strict=True):
        storage.write_atomic(storage.join(folder, Snapshot(saved.step, length).name), pack(average))


def position(config: TrainConfig, step: int, rows: int) -> dict[str, int]:
    """A run's position in its data after a number of steps: samples seen, epoch, and row in the epoch.

    Args:
        rows: number of samples in an epoch.
    """
    samples = step * config.batch_size
    return {"samples": samples, "epoch": samples // rows, "row": samples % rows}


def _check_shared(task: Task) -> None:
    node = ray.util.get_node_ip_address()
    patient = PatientOnChannel(task.channel, task.config.storage_patience)

    def sees(uri: str, **options: bool) -> bool:
        return patient(lambda: storage.exists(uri, **options), f"the node {node} can't reach {uri}")

    if not sees(storage.join(task.output, RUN_FILE)):
        raise InputError(
            f"--output {task.output}: the node {node} does not see what the driver wrote there: give a folder that all "
            "nodes share, or an object store (s3://…)"
        )
    if not sees(task.config.data, pattern=True):
        raise InputError(
            f"--data {task.config.data}: the node {node} does not see it: give a folder that all nodes share, or an "
            "object store (s3://…)"
        )


def _nonfinite_file(error: loop.NonFinite) -> str:
    return f"nonfinite/step-{error.step:09d}.json"


def _nonfinite_record(error: loop.NonFinite) -> bytes:
    """The samples of a step as JSON. A loss that is not finite becomes a string, because JSON has no NaN."""
    samples = [
        {**s, "loss": s["loss"] if math.isfinite(s["loss"]) else str(s["loss"])} for s in error.samples
    ]
    return json.dumps({"step": error.step, "samples": samples}, indent=1).encode()
