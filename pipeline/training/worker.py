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
import torch
from safetensors.torch import save as pack
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import ModelSpec, TrainConfig
from pipeline.data import storage
from pipeline.errors import InputError
from pipeline.models import ema
from pipeline.training import checkpoint, loop
from pipeline.training.agreement import Agreement
from pipeline.training.history import CHECKPOINTS, History
from pipeline.training.meter import Meter
from pipeline.training.progress import Point

RUN_FILE = "run.json"
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
        mailbox: see progress.py.
        run_id: of the MLflow run.
        rows: samples in an epoch.
    """

    config: TrainConfig
    spec: ModelSpec
    output: str
    mailbox: Any
    run_id: str
    rows: int
    hooks: Hooks


def run(settings: dict[str, Task]) -> None:
    """What Ray Train runs on every worker."""
    task = settings["task"]
    # Ray Train restarts the group after any error; where a restart can't help, it ends here instead.
    if ray.get(task.mailbox.reason_to_give_up.remote()):
        return
    try:
        _run(task)
    except InputError as error:
        ray.get(task.mailbox.give_up.remote(str(error)))
        raise
    except loop.NonFinite as error:
        reason = f"{error}; their ids are in {_nonfinite_file(error)} of the output, and the last checkpoint is good"
        advice = "resume with a smaller --learning-rate, or pass --skip-nonfinite"
        ray.get(task.mailbox.give_up.remote(f"{reason}: {advice}"))
        raise


def _run(task: Task) -> None:
    config, spec, mailbox = task.config, task.spec, task.mailbox
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    _check_shared(task)
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    else:
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))

    history = History(
        storage.join(task.output, CHECKPOINTS),
        rank,
        mailbox,
        validate=lambda step: is_validated(config, step),
        also=lambda saved: keep_snapshots(storage.join(task.output, SNAPSHOTS), config, saved),
    )
    state = loop.new_state(config, spec, device)
    meter = Meter(config, world_size, device)
    points: list[Point] = []
    if found := history.restore():
        saved, kept = found
        checkpoint.restore(state, saved)
        meter.restore(kept["meter"], rank)
        if rank == 0:  # the driver may have been killed before it had delivered them
            mailbox.post.remote([tuple(point) for point in kept["points"]])
    elif task.hooks.start_from:
        checkpoint.restore(state, checkpoint.read(task.hooks.start_from)[0])
    # From here on images are read and decoded, while the model is made ready.
    stream = ray.train.get_dataset_shard("train")
    batches = stream.batches(state.step, config.steps, pin=device.type == "cuda")
    model: nn.Module = state.model
    if config.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    if world_size > 1:
        static = not config.microbatch
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=static)

    asked = mailbox.asked_to_stop.remote() if rank == 0 else None
    agreement = Agreement(world_size)
    last_saved = state.step

    def on_log(step: int, metrics: dict[str, float]) -> None:
        if rank == 0:
            points.append((int(time.time() * 1000), step, metrics | {"workers": world_size}))
            mailbox.post.remote(points[-1:])

    def on_checkpoint(current: loop.TrainState) -> None:
        nonlocal last_saved
        extra = {
            "run_id": task.run_id,
            "position": position(config, current.step, task.rows),
            "learning_rate": loop.learning_rate(config, current.step),
            "meter": meter.state(),
            "points": list(points),
        }
        history.save(lambda: checkpoint.capture(current), current.step, extra)
        points.clear()
        last_saved = current.step

    def should_stop() -> bool:
        if task.hooks.watch is not None and task.hooks.watch(state, rank, world_size):
            return True
        return agreement(asked is not None and bool(ray.wait([asked], timeout=0)[0]))

    def on_skip(error: loop.NonFinite) -> None:
        if rank == 0:
            mailbox.post_file.remote(_nonfinite_file(error), _nonfinite_record(error))
            mailbox.notice.remote(f"{error}: skipped; their ids are in {_nonfinite_file(error)}")

    if rank == 0:
        mailbox.set_running.remote(True)
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
    except loop.NonFinite as error:
        if rank == 0:
            ray.get(mailbox.post_file.remote(_nonfinite_file(error), _nonfinite_record(error)))
        raise
    if state.step != last_saved:  # asked to stop
        on_checkpoint(state)


def is_validated(config: TrainConfig, step: int) -> bool:
    """Whether the checkpoint at a step is validated: every `validate_every`-th, and the last one."""
    if not config.validate_every:
        return False
    return step == config.steps or step % (config.validate_every * config.checkpoint_every) == 0


def keep_snapshots(folder: str, config: TrainConfig, saved: checkpoint.Saved) -> None:
    """Writes the power-function averages where no checkpoint's removal takes them (see `models.ema`)."""
    options = config.optimizer
    lengths = saved.averages[len(options.ema_decays) :]
    for length, average in zip(options.ema_lengths, lengths, strict=True):
        storage.write_atomic(storage.join(folder, ema.Snapshot(saved.step, length).name), pack(average))


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
    if not storage.exists(task.config.data):
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
