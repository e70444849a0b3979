"""The training loop inside a Ray Train worker: process group, stream, checkpoints."""

import contextlib
import json
import math
import time
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import ray.train
import ray.train.torch
from safetensors.torch import save as pack

from pipeline import storage
from pipeline.config import ModelSpec, TrainConfig
from pipeline.errors import InputError
from pipeline.models.snapshots import Snapshot
from pipeline.training import checkpoint, flops, loop, network
from pipeline.training.agreement import Agreement
from pipeline.training.checkpoint_manager import CHECKPOINTS, CheckpointManager
from pipeline.training.identity import RUN_FILE
from pipeline.training.meter import Meter
from pipeline.training.run_channel import Command, Point

SNAPSHOTS = "snapshots"


class Watch(Protocol):
    """Looks at the training state between two steps, on every worker; travels to it by pickle, within the job."""

    def __call__(self, state: loop.TrainState, rank: int, world_size: int) -> bool:
        """Whether the run ends here, as it would after its last step; all workers must answer alike."""


@dataclass(frozen=True)
class Hooks:
    """What a caller of `trainer.train` may add to a run (see pipeline.tuning).

    Attributes:
        watch: asked before each step and after the last one.
        start_from: folder of a checkpoint that a run without one of its own starts from.
        run_id: MLflow run to log to, opened by the caller; empty = the run opens its own.
        log_model: log the exported model to MLflow.
    """

    watch: Watch | None = None
    start_from: str = ""
    run_id: str = ""
    log_model: bool = True


@dataclass(frozen=True)
class Task:
    """What the driver gives every worker.

    Args:
        output: URI of the run.
        channel: see run_channel.py.
        run_id: of the MLflow run.
        rows: samples in an epoch.
    """

    config: TrainConfig
    spec: ModelSpec
    output: str
    channel: Any
    run_id: str
    rows: int
    hooks: Hooks


def train_loop_per_worker(settings: dict[str, Task]) -> None:
    """What Ray Train runs on every worker."""
    task = settings["task"]
    # Ray Train restarts the group after any error; where a restart can't help, it ends here instead.
    if ray.get(task.channel.reason_to_give_up.remote()):
        return
    try:
        _run(task)
    except InputError as error:
        ray.get(task.channel.give_up.remote(str(error)))
        raise
    except loop.NonFinite as error:
        reason = f"{error}; their ids are in {_nonfinite_file(error)} of the output, and the last checkpoint is good"
        advice = "resume with a smaller --learning-rate, or pass --skip-nonfinite"
        ray.get(task.channel.give_up.remote(f"{reason}: {advice}"))
        raise


def _run(task: Task) -> None:
    config, spec, channel = task.config, task.spec, task.channel
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    _check_shared(task)
    device = ray.train.torch.get_device()
    network.prepare_device(config, device)

    manager = CheckpointManager(
        storage.join(task.output, CHECKPOINTS),
        rank,
        channel,
        validate=lambda step: is_validated(config, step),
        on_write=lambda saved: keep_snapshots(storage.join(task.output, SNAPSHOTS), config, saved),
    )
    state = loop.new_state(config, spec, device)
    peak = config.peak_tflops * 1e12 or flops.peak_flops(device, network.uses_bf16(config, device))
    per_image = flops.flops_per_image(spec) if rank == 0 else 0  # rank 0 posts the curve
    meter = Meter(config, world_size, device, per_image, peak)
    points: list[Point] = []
    if found := manager.restore():
        saved, kept = found
        checkpoint.restore(state, saved)
        meter.restore(kept, rank)
        if rank == 0:  # the driver may have been killed before it had delivered them
            channel.post_points.remote([tuple(point) for point in kept["points"]])
    elif task.hooks.start_from:
        checkpoint.restore(state, checkpoint.read(task.hooks.start_from)[0])
    # From here on images are read and decoded, while the model is made ready.
    stream = ray.train.get_dataset_shard("train")
    batches = stream.batches(
        state.step, config.steps, pin=device.type == "cuda", on_bad=channel.quarantine.remote
    )
    model = network.wrap(config, state.model, world_size)

    commands = CommandListener(channel, state.step, world_size) if rank == 0 else None
    agreement = Agreement(world_size)
    last_saved = state.step

    def on_log(step: int, metrics: dict[str, float]) -> None:
        if rank == 0:
            points.append((int(time.time() * 1000), step, metrics | {"workers": world_size}))
            channel.post_points.remote(points[-1:])

    def capture() -> checkpoint.Saved:
        return checkpoint.capture(state)

    def facts() -> dict[str, Any]:
        return {
            "run_id": task.run_id,
            "position": position(config, state.step, task.rows),
            "learning_rate": loop.learning_rate(config, state.step),
            **meter.state(),
            "points": list(points),
        }

    def on_checkpoint(_: loop.TrainState) -> None:
        nonlocal last_saved
        manager.save(capture, state.step, facts())
        points.clear()
        last_saved = state.step

    def should_stop() -> bool:
        if task.hooks.watch is not None and task.hooks.watch(state, rank, world_size):
            return True
        command = agreement(commands() if commands else Command.NOTHING)
        if command == Command.SAVE:
            manager.save_now(capture, state.step, facts())
        return command == Command.STOP

    def on_skip(error: loop.NonFinite) -> None:
        if rank == 0:
            channel.post_file.remote(_nonfinite_file(error), _nonfinite_record(error))
            channel.notice.remote(f"{error}: skipped; their ids are in {_nonfinite_file(error)}")

    try:
        with contextlib.closing(batches):
            loop.train(
                config,
                spec,
                state,
                model,
                batches,
                device,
                world_size,
                on_log,
                on_checkpoint,
                meter,
                should_stop,
                on_skip,
            )
    except (InputError, loop.NonFinite) as error:
        manager.flush()  # what was good until here
        if rank == 0 and isinstance(error, loop.NonFinite):
            ray.get(channel.post_file.remote(_nonfinite_file(error), _nonfinite_record(error)))
        raise
    if task.hooks.watch is not None and state.step == config.steps:
        task.hooks.watch(state, rank, world_size)
    if state.step != last_saved:  # asked to stop
        on_checkpoint(state)


class CommandListener:
    """What the driver commands, as rank 0 hears of it without waiting."""

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
    """Whether the checkpoint at a step is validated: every `validate_every`-th, and the last one."""
    if not config.validate_every:
        return False
    return step == config.steps or step % (config.validate_every * config.checkpoint_every) == 0


def keep_snapshots(folder: str, config: TrainConfig, saved: checkpoint.Saved) -> None:
    """Writes the power-function averages where no checkpoint's removal takes them (see `models.snapshots`)."""
    options = config.optimizer
    lengths = saved.averages[len(options.ema_decays) :]
    for length, average in zip(options.ema_lengths, lengths, strict=True):
        storage.write_atomic(storage.join(folder, Snapshot(saved.step, length).name), pack(average))


def position(config: TrainConfig, step: int, rows: int) -> dict[str, int]:
    """Where a run is in its data after a number of steps."""
    samples = step * config.batch_size
    return {"samples": samples, "epoch": samples // rows, "row": samples % rows}


def _check_shared(task: Task) -> None:
    node = ray.util.get_node_ip_address()
    if not storage.exists(storage.join(task.output, RUN_FILE)):
        raise InputError(
            f"--output {task.output}: the node {node} does not see what the driver wrote there: give a folder that all "
            "nodes share, or an object store (s3://…)"
        )
    if not storage.exists(task.config.data, pattern=True):
        raise InputError(
            f"--data {task.config.data}: the node {node} does not see it: give a folder that all nodes share, or an "
            "object store (s3://…)"
        )


def _nonfinite_file(error: loop.NonFinite) -> str:
    return f"nonfinite/step-{error.step:09d}.json"


def _nonfinite_record(error: loop.NonFinite) -> bytes:
    """JSON, which has no word for NaN."""
    samples = [
        {**s, "loss": s["loss"] if math.isfinite(s["loss"]) else str(s["loss"])} for s in error.samples
    ]
    return json.dumps({"step": error.step, "samples": samples}, indent=1).encode()
