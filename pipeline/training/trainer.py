"""A training run from the driver's side: checks, MLflow, Ray Train, the exported model."""

import contextlib
import os
import sys
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
from torch import Tensor

from pipeline import storage
from pipeline.cluster.room import TRAIN_WORKERS, Need, announced, check_fits, release_orphans
from pipeline.config import ModelSpec, TrainConfig, to_dict
from pipeline.data.index import Splits
from pipeline.data.stream import PlannedData, share
from pipeline.display import Display
from pipeline.errors import InputError, Interrupted
from pipeline.evaluation.config import BITS_PER_DIM
from pipeline.lock import locked
from pipeline.models.export import load_model, save_model
from pipeline.patience import arrow_fs, patiently
from pipeline.pictures.draw import file_of
from pipeline.pictures.make import draw_samples
from pipeline.tracking import runs
from pipeline.tracking.tracker import Tracker
from pipeline.training import checkpoint, worker
from pipeline.training.channel_reader import ChannelReader
from pipeline.training.checkpoint_manager import CHECKPOINTS, mend, newest_whole, sweep
from pipeline.training.checks import check
from pipeline.training.identity import open_run
from pipeline.training.run_channel import (
    CURVES,
    PatientOnChannel,
    open_channel,
    read_quarantine,
)
from pipeline.training.signals import SaveBeforeShutdown, run_until_signal
from pipeline.training.validation import SpareResources, Validator

SAMPLES = "samples.png"


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


def train(
    config: TrainConfig,
    data: Splits | None = None,
    *,
    callbacks: Sequence[Any] = (),
    on_point: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    hooks: worker.Hooks = worker.Hooks(),  # noqa: B008  (frozen)
    tracker: Tracker | None = None,
) -> Trained:
    """Trains, or goes on training, and exports the averaged model to `OUTPUT/model`.

    Args:
        data: what `config.data` names, where it is open already.
        callbacks: `ray.train.UserCallback`s for Ray Train's controller.
        on_point: told, in a thread of this process, each new point of the curves once: its step and values. Those of
            the training hold `loss`, those of the validation `bits_per_dim`.
        hooks: see there.
        tracker: of the MLflow run to log to, where the caller has opened it, who also holds the lock of a folder around
            the output, logs the settings and the model, and ends the run.

    Raises:
        InputError: see `check`; also a run in `output` that was not to be resumed, that has other settings, or that
            another driver trains.
        Interrupted: a signal ended the run; it was saved first.
    """
    data, spec = check(config, data)
    if tracker is None:  # a search has asked for all of its trials
        check_fits(room_needed(config))
    config = replace(config, data=storage.absolute(config.data))
    output = storage.absolute(config.output)
    display = Display("train", config.steps, "steps")
    patient = partial(patiently, seconds=config.storage_patience, say=display.note)
    with contextlib.ExitStack() as stack:
        lost = tracker.lost if tracker else stack.enter_context(locked(output))
        run, is_new = open_run(config, spec, data["train"], output, tracker.run if tracker else None)
        if mine := tracker is None:
            tracker = Tracker(run, output, CURVES, config.tracking_patience, display.note, lost)
            stack.enter_context(tracker)
        if is_new and mine:
            settings = to_dict(replace(config, resume=False))
            tracker.log_params(settings)
            tracker.log_config(settings)
        if is_new:
            index = data["train"]
            tracker.log_dataset(config.data, index.fingerprint, index.rows, index.quarantined)
        data = data.keep(output)
        status = "FAILED"
        try:
            weights, metrics = _train(
                config, data, spec, output, tracker, display, callbacks, on_point, hooks
            )
            place = storage.join(output, "model")
            exported = patient(lambda: save_model(place, weights, spec), f"{place} can't be written")
            if mine:
                tracker.log_model(exported, config.register, config.alias)
                patient(lambda: _draw_samples(config, output), f"{SAMPLES} can't be written to {output}")
                tracker.log_file(SAMPLES)
            status = "FINISHED"
        except (Interrupted, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            if mine or status != "FINISHED":
                tracker.end(status)
    name = tracker.model if config.register and tracker.model else place
    folder = Path(exported) if storage.is_local(exported) else exported
    return Trained(run, folder, spec, name, metrics)


def _draw_samples(config: TrainConfig, output: str) -> None:
    """Draws samples of the exported model into the output."""
    model = load_model(storage.join(output, "model"))
    picture = file_of(lambda path: draw_samples(*model, path, seed=config.seed))
    storage.write_atomic(storage.join(output, SAMPLES), picture)


def _train(
    config: TrainConfig,
    data: Splits,
    spec: ModelSpec,
    output: str,
    tracker: Tracker,
    display: Display,
    callbacks: Sequence[Any],
    on_point: Callable[[int, dict[str, float]], None],
    hooks: worker.Hooks,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Runs Ray Train to the last step, or to where the caller's watch ends it.

    Returns:
        the weights to export, and the last point of each curve.
    """
    folder = storage.join(output, CHECKPOINTS)
    patient = partial(patiently, seconds=config.storage_patience, say=display.note)
    mend(folder, patient)
    channel = open_channel(read_quarantine(output))
    try:
        trainer = _trainer(config, data, spec, output, tracker.run, channel, callbacks, hooks)
        with ChannelReader(channel, output, display, tracker, on_point) as reader:
            try:
                with announced(room_needed(config), display.note):
                    result, signal_number = run_until_signal(trainer.fit, channel, display.note)
            except (ray.exceptions.RayError, ray.train.TrainingFailedError):
                release_orphans()
                _raise_reason(channel)
                raise
            _raise_reason(channel)
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
        return weights, reader.latest
    finally:
        ray.kill(channel)


def _raise_reason(channel: Any) -> None:
    """Raises what a worker has said of why the run can't go on."""
    if reason := ray.get(channel.reason_to_give_up.remote()):
        raise reason


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
    plan = index.plan(config.seed, config.batch_size)
    if warning := index.poorly_mixed(plan):
        print(warning, file=sys.stderr, flush=True)
    planned = share(index, plan)
    gpu = _use_gpu(config)
    filesystem, path = arrow_fs(output, PatientOnChannel(channel, config.storage_patience))
    validation, scored = None, {}
    if config.validate_every:
        validation = ValidationConfig(
            Validator(config, spec, data["validation"], output, channel),
            ray_remote_kwargs=SpareResources(config, gpu),
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
            resources_per_worker={"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker * gpu},
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
        datasets={"train": lambda: planned},
        dataset_config=PlannedData(config.readers, config.random_crop),
        validation_config=validation,
    )


def room_needed(config: TrainConfig) -> Need:
    """The least with which a run goes on."""
    least = config.min_workers or config.workers
    each = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker * _use_gpu(config)}
    count = f"--min-workers {least}" if config.min_workers else f"--workers {least}"
    share = "" if config.gpus_per_worker == 1 else f" --gpus-per-worker {config.gpus_per_worker:g}"
    flags = f"{count} --cpus-per-worker {config.cpus_per_worker:g}{f' --gpu{share}' * _use_gpu(config)}"
    reserved = {name: amount for name, amount in each.items() if amount}
    return Need(least, reserved, TRAIN_WORKERS, flags)


def _use_gpu(config: TrainConfig) -> bool:
    if config.gpu is not None:
        return config.gpu
    least = (config.min_workers or config.workers) * config.gpus_per_worker
    return bool(ray.cluster_resources().get("GPU", 0) >= least)
