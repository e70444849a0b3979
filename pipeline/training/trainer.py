"""A training run from the driver's side: checks, MLflow, Ray Train, the exported model."""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    ValidationConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import __version__, storage
from pipeline.cluster.session import spilled_bytes
from pipeline.config import ModelSpec, TrainConfig, check_at_least
from pipeline.data.index import DatasetIndex, Splits, open_splits
from pipeline.data.order import Plan
from pipeline.data.stream import PlannedData
from pipeline.diffusion.schedules import make_betas, resolve
from pipeline.display import Display
from pipeline.errors import InputError, Interrupted
from pipeline.evaluation.config import BITS_PER_DIM
from pipeline.lock import locked
from pipeline.models.ema import power_gamma
from pipeline.models.export import save_model
from pipeline.models.unet import check_model
from pipeline.output import check_apart
from pipeline.patience import arrow_fs, patiently
from pipeline.tracking import registry, runs
from pipeline.training import checkpoint, worker
from pipeline.training.checkpoint_manager import CHECKPOINTS, mend, newest_whole, sweep
from pipeline.training.identity import open_run
from pipeline.training.run_channel import (
    ChannelReader,
    PatientOnChannel,
    Point,
    open_channel,
    read_quarantine,
)
from pipeline.training.signals import SaveBeforeShutdown, run_until_signal
from pipeline.training.validation import Validator


@dataclass(frozen=True)
class Trained:
    """What a run leaves behind.

    Attributes:
        folder: the exported model; a URI where the output is on an object store.
        model: its name for the other jobs.
    """

    run: runs.Run
    folder: str | Path
    spec: ModelSpec
    model: str
    metrics: dict[str, float]


def make_spec(config: TrainConfig, index: DatasetIndex) -> ModelSpec:
    """The model that a configuration and a dataset call for, with where it came from."""
    return ModelSpec(
        model=config.model,
        image=index.image,
        diffusion=resolve(config.diffusion),
        provenance={
            "ray_ddpm": __version__,
            "data": config.data,
            "data_fingerprint": index.fingerprint,
            "data_rows": index.rows,
            "steps": config.steps,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "ema_decay": config.optimizer.ema_decays[0],
        },
    )


def check(config: TrainConfig, data: Splits | None = None) -> tuple[Splits, ModelSpec]:
    """Everything that can be known to be wrong before a cluster is asked for anything.

    Args:
        data: what `config.data` names, where it is open already.

    Returns:
        the data, and the model to train.

    Raises:
        InputError: in one line, what to change.
    """
    names = "steps workers batch_size log_every checkpoint_every keep_checkpoints readers"
    check_at_least(config, **dict.fromkeys(names.split(), 1), storage_patience=0)
    if config.cache_gb <= 0:
        raise InputError(
            f"--cache-gb {config.cache_gb:g} must be more than 0; without --cache-dir nothing is kept"
        )
    if config.cache_dir and not storage.is_local(config.cache_dir):
        raise InputError(f"--cache-dir {config.cache_dir} must be a folder on the nodes' own disks")
    if config.min_workers > config.workers:
        raise InputError(f"--min-workers {config.min_workers} is more than --workers {config.workers}")
    if config.batch_size < config.workers:
        raise InputError(
            f"--batch-size {config.batch_size} is the global batch and is split over --workers {config.workers}: "
            "it must be at least as large"
        )
    if not config.optimizer.ema_decays:
        raise InputError(
            "--ema-decays needs at least one value: the first average is the model that is exported"
        )
    for length in config.optimizer.ema_lengths:
        power_gamma(length)
    check_apart(config.output, "--data", config.data)
    data = data or open_splits(config.data, config.image_size, config.reading, config.split)
    spec = make_spec(config, data["train"])
    make_betas(spec.diffusion)
    check_model(spec.model, spec.image)
    if config.validate_every:
        if data["validation"].rows < 2 or config.validation_images == 1:
            raise InputError("--validate-every needs at least two held-out images")
        if config.validation_terms % 2 and config.validation_terms < spec.diffusion.timesteps:
            raise InputError(
                f"--validation-terms {config.validation_terms}: give an even number, or 0 for every term"
            )
    storage.check_writable(config.output)
    return data, spec


def train(
    config: TrainConfig,
    data: Splits | None = None,
    *,
    callbacks: Sequence[Any] = (),
    on_point: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    hooks: worker.Hooks = worker.Hooks(),  # noqa: B008  (frozen)
) -> Trained:
    """Trains, or goes on training, and exports the averaged model to `OUTPUT/model`.

    Args:
        data: what `config.data` names, where it is open already.
        callbacks: `ray.train.UserCallback`s for Ray Train's controller.
        on_point: told, in a thread of this process, each new point of the curves once: its step and values. Those of
            the training hold `loss`, those of the validation `bits_per_dim`.
        hooks: see there.

    Raises:
        InputError: see `check`; also a run in `output` that was not to be resumed, that has other settings, or that
            another driver trains.
        Interrupted: a signal ended the run; it was saved first.
    """
    data, spec = check(config, data)
    config = replace(config, data=storage.absolute(config.data))
    output = storage.absolute(config.output)
    # A caller that opened the MLflow run holds the lock of the folder that the output lies in.
    with contextlib.nullcontext(threading.Event()) if hooks.run_id else locked(output) as lost:
        run = open_run(config, spec, data["train"], output, hooks.run_id)
        return _train(config, data, spec, output, run, callbacks, on_point, hooks, lost)


def _train(
    config: TrainConfig,
    data: Splits,
    spec: ModelSpec,
    output: str,
    run: runs.Run,
    callbacks: Sequence[Any],
    on_point: Callable[[int, dict[str, float]], None],
    hooks: worker.Hooks,
    lost: threading.Event,
) -> Trained:
    folder = storage.join(output, CHECKPOINTS)
    display = Display("train", config.steps, "steps")
    patient = partial(patiently, seconds=config.storage_patience, say=display.note)
    mend(folder, patient)
    channel = open_channel(read_quarantine(output))
    trainer = _trainer(config, data, spec, output, run, channel, callbacks, hooks)

    def deliver(points: list[Point], files: list[tuple[str, bytes]]) -> None:
        spilled = {"spilled_bytes": float(spilled_bytes())}
        runs.log_points(run, [(time, step, values | spilled) for time, step, values in points])
        for path, content in files:
            storage.write_atomic(storage.join(output, path), content)
            runs.log_bytes(run, path, content)

    status = "FAILED"
    try:
        with ChannelReader(channel, display, run.last_steps, deliver, on_point, lost) as reader:
            try:
                result, signal_number = run_until_signal(trainer.fit, channel, display.note)
            except (ray.exceptions.RayError, ray.train.TrainingFailedError):
                if reason := ray.get(channel.reason_to_give_up.remote()):
                    raise InputError(reason) from None
                raise
            if reason := ray.get(channel.reason_to_give_up.remote()):
                raise InputError(reason)
        found = newest_whole(folder, checkpoint.read_model, patient, display.note)
        weights, step = found[1] if found else ({}, 0)
        kept = [entry for entry, _ in result.best_checkpoints or []]
        patient(lambda: sweep(folder, kept), f"checkpoints in {folder} can't be removed")
        if signal_number and step < config.steps:
            raise Interrupted(
                f"stopped at step {step} of {config.steps}, which is saved; go on with --resume",
                signal_number,
            )
        if step < config.steps and hooks.watch is None:
            raise InputError(
                f"the checkpoint of step {config.steps} in {folder} is damaged: go on with --resume"
            )
        status = "RUNNING"
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        ray.kill(channel)
        if status != "RUNNING" and not lost.is_set():  # else the run is the other driver's
            runs.end_run(run, status)
    place = storage.join(output, "model")
    exported = save_model(place, weights, spec)
    name = place
    if hooks.log_model:
        logged = registry.log_model(run, exported, config.register, config.alias)
        name = logged if config.register else name
    return Trained(run, Path(exported) if storage.is_local(exported) else exported, spec, name, reader.latest)


def _trainer(
    config: TrainConfig,
    data: Splits,
    spec: ModelSpec,
    output: str,
    run: runs.Run,
    channel: Any,
    callbacks: Sequence[Any],
    hooks: worker.Hooks,
) -> TorchTrainer:
    if config.min_workers:
        # Seconds that Ray waits for a dead node's resources before it continues with fewer workers; 60 by default.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    index = data["train"]
    plan = Plan(tuple(g.rows for g in index.groups), config.seed, config.batch_size, config.groups_per_window)
    gpu = _use_gpu(config)
    filesystem, path = arrow_fs(output, PatientOnChannel(channel, config.storage_patience))
    validation, scored = None, {}
    if config.validate_every:
        validation = ValidationConfig(
            Validator(config, spec, data["validation"], output, channel),
            ray_remote_kwargs=_validation_resources(config, gpu),
        )
        scored = {"checkpoint_score_attribute": BITS_PER_DIM, "checkpoint_score_order": "min"}
    return TorchTrainer(
        worker.train_loop_per_worker,
        train_loop_config={"task": worker.Task(config, spec, output, channel, run.id, index.rows, hooks)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.workers) if config.min_workers else config.workers,
            use_gpu=gpu,
            elastic_resize_monitor_interval_s=config.resize_seconds,
            resources_per_worker={"CPU": config.cpus_per_worker, "GPU": int(gpu)},
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(config.keep_checkpoints, **scored),
            failure_config=FailureConfig(max_failures=config.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[SaveBeforeShutdown(channel), *callbacks],
        ),
        datasets={"train": lambda: index},
        dataset_config=PlannedData(plan, config.readers, config.random_crop),
        validation_config=validation,
    )


def _validation_resources(config: TrainConfig, gpu: bool) -> dict[str, Any]:
    """What the workers leave of the cluster; no CPU at all where they leave none: it must not wait for their end."""
    total = ray.cluster_resources()
    spare_cpus = total.get("CPU", 0) - config.workers * config.cpus_per_worker
    spare_gpus = total.get("GPU", 0) - config.workers if gpu else 0
    # An environment of its own gives it processes of its own, whose low priority no other task inherits.
    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    return {"num_cpus": int(spare_cpus >= 1), "num_gpus": int(spare_gpus >= 1), "runtime_env": environment}


def _use_gpu(config: TrainConfig) -> bool:
    available = ray.cluster_resources().get("GPU", 0) >= config.workers
    if config.gpu and not available:
        raise InputError(f"--gpu: the cluster has fewer GPUs than --workers {config.workers}")
    return available if config.gpu is None else config.gpu
