"""The training loop inside a Ray Train worker: process group, stream, checkpoints."""

import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from safetensors.torch import save as pack
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import ModelSpec, TrainConfig
from pipeline.data import storage
from pipeline.errors import InputError
from pipeline.models import ema
from pipeline.training import checkpoint, loop


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


def run(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs: `settings` has config, spec, mailbox, run_id and hooks (see trainer.py)."""
    mailbox = settings["mailbox"]
    # Ray Train restarts the group after any error; where a restart can't help, it ends here instead.
    if ray.get(mailbox.reason_to_stop.remote()):
        return
    try:
        _run(settings)
    except (InputError, loop.NonFinite) as error:
        ray.get(mailbox.stop.remote(str(error)))
        raise


def _run(settings: dict[str, Any]) -> None:
    config: TrainConfig = settings["config"]
    spec: ModelSpec = settings["spec"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    else:
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))

    state = loop.new_state(config, spec, device)
    hooks: Hooks = settings["hooks"]
    if saved := newest_good_checkpoint():
        checkpoint.restore(state, saved)
    elif hooks.start_from:
        checkpoint.restore(state, checkpoint.read(Path(hooks.start_from))[0])
    # From here on images are read and decoded, while the model is made ready.
    stream = ray.train.get_dataset_shard("train")
    batches = stream.batches(state.step, config.steps, pin=device.type == "cuda")
    model: nn.Module = state.model
    if config.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    if world_size > 1:
        static = not config.microbatch
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=static)

    mailbox = settings["mailbox"]

    def on_log(step: int, metrics: dict[str, float]) -> None:
        if rank == 0:
            mailbox.post.remote((int(time.time() * 1000), step, metrics | {"workers": world_size}))

    def on_checkpoint(current: loop.TrainState) -> None:
        saved = checkpoint.capture(current) if rank == 0 else None
        if saved:
            keep_snapshots(settings["snapshots"], config, saved)
        save(current.step, saved, {"run_id": settings["run_id"]})

    def should_stop() -> bool:
        return hooks.watch is not None and hooks.watch(state, rank, world_size)

    with contextlib.closing(batches):
        loop.train(
            config, spec, state, model, batches, device, world_size, on_log, on_checkpoint, should_stop
        )


def keep_snapshots(folder: str, config: TrainConfig, saved: checkpoint.Saved) -> None:
    """Writes the power-function averages where no checkpoint's removal takes them (see `models.ema`)."""
    options = config.optimizer
    lengths = saved.averages[len(options.ema_decays) :]
    for length, average in zip(options.ema_lengths, lengths, strict=True):
        storage.write_atomic(storage.join(folder, ema.Snapshot(saved.step, length).name), pack(average))


def save(step: int, saved: checkpoint.Saved | None, extra: dict[str, Any]) -> None:
    """Hands a checkpoint to Ray Train, which uploads it in the background and registers it when whole.

    Args:
        saved: on rank 0; None elsewhere.
    """
    written = None
    if saved:
        folder = Path(tempfile.mkdtemp(prefix="ray-ddpm-checkpoint-"))
        checkpoint.write(folder, saved, extra)
        written = Checkpoint.from_directory(str(folder))
    ray.train.report(
        {"step": step},
        checkpoint=written,
        checkpoint_dir_name=f"step-{step:09d}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def newest_good_checkpoint() -> checkpoint.Saved | None:
    """The newest registered checkpoint whose bytes are as written; a damaged one is reported and passed over."""
    newest = ray.train.get_checkpoint()
    if newest is None:
        return None
    reported = [entry.checkpoint for entry in ray.train.get_all_reported_checkpoints()]
    candidates = {str(c.path): c for c in [*reported, newest]}
    for candidate in reversed(list(candidates.values())):
        try:
            with candidate.as_directory() as folder:
                return checkpoint.read(Path(folder))[0]
        except (checkpoint.DamagedCheckpoint, OSError) as error:
            print(f"checkpoint passed over: {error}", flush=True)
    return None
