"""A training run on the driver: checks, MLflow, Ray Train, the exported model."""

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
import torch
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
from pipeline.cluster.ray_internals import no_cleaner_without_dashboard
from pipeline.cluster.room import TRAIN_WORKERS, Need, announced, choose_gpu, release_orphans
from pipeline.config import ModelSpec, TrainConfig
from pipeline.data.index import Splits
from pipeline.data.stream import PlannedData, share
from pipeline.display import Display
from pipeline.errors import InputError, Interrupted
from pipeline.evaluation.config import BITS_PER_DIM
from pipeline.lock import locked
from pipeline.models.export import load_model, save_model
from pipeline.patience import arrow_fs, patiently
from pipeline.tracking import address, registry, runs
from pipeline.tracking.tracker import Tracker
from pipeline.training import checkpoint, worker
from pipeline.training.channel_reader import ChannelReader
from pipeline.training.checkpoint_manager import CHECKPOINTS, mend, newest_whole, sweep
from pipeline.training.checks import check
from pipeline.training.identity import logged_config, logged_settings, open_run, run_name
from pipeline.training.run_channel import (
    CURVES,
    PatientOnChannel,
    open_channel,
    read_quarantine,
)
from pipeline.training.signals import SaveBeforeShutdown, run_until_signal
from pipeline.training.validation import SpareResources, Validator

SAMPLES = registry.PICTURE
DRAWING_WAITS_SECONDS = 60


@dataclass(frozen=True)
class Trained:
    """The result of a run.

    Attributes:
        run: the MLflow run.
        folder: folder of the exported model; a URI if the output is on an object store.
        spec: specification of the model.
        model: name of the model for the other jobs: a registry name, or the folder.
        metrics: last value of each figure, by name.
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
    """Trains, or continues training, and exports the averaged model to `OUTPUT/model`.

    Args:
        data: the dataset that `config.data` names, if it is already open.
        callbacks: `ray.train.UserCallback`s for Ray Train's controller.
        on_point: called once for each new point of the curves with its step and values, in a thread of this process.
            Points of the training hold `loss`, those of the validation `bits_per_dim`.
        hooks: additions of the caller, see `worker.Hooks`.
        tracker: tracker of the MLflow run, if the caller has opened it. That caller also locks a folder around the
            output, logs the settings and the model, and ends the run.

    Raises:
        InputError: as `checks.check`; or `output` holds a run and --resume was not given, or a run with other settings,
            or another driver trains it.
        Interrupted: a signal ended the run, which was saved first.
    """
    data, spec = check(config, data)
    config = replace(config, data=storage.absolute(config.data))
    output = storage.absolute(config.output)
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(Display("train", config.steps, "steps"))

        def written(write: Callable[[], Any], what: str) -> Any:
            with storage.reporting(what, "; go on with --resume"):
                return patiently(write, what, seconds=config.storage_patience, say=display.note)

        # A search chooses for all its trials, and makes sure that one fits.
        if tracker and config.gpu is not None:
            gpu = config.gpu
        else:
            gpu = choose_gpu(config.gpu, partial(room_needed, config), display.note)
        display.phase("opening the MLflow run")
        lost = tracker.lost if tracker else stack.enter_context(locked(output))
        run = open_run(config, spec, data["train"], output, tracker.run if tracker else None)
        if mine := tracker is None:
            name = config.run_name or run_name(config, spec)
            display.note(f"MLflow run {name!r}: {address.how_to_open(run.id)}")
            tracker = Tracker(run, output, CURVES, config.tracking_patience, display.note, lost)
            stack.enter_context(tracker)
        # A resume logs this too, because a driver that was killed may have logged none of it. MLflow keeps what it has.
        if mine:
            tracker.log_params(logged_settings(config))
            tracker.log_config(logged_config(config))
        index = data["train"]
        tracker.log_dataset(config.data, index.fingerprint, index.rows, index.quarantined)
        data = data.keep(output)
        status = "FAILED"
        try:
            job = _Job(
                replace(config, gpu=gpu), data, spec, output, tracker, display, callbacks, on_point, hooks
            )
            weights, step, metrics = _train(job)
            # A search ends a run early, and a resume may ask for fewer steps than the run has made.
            spec = replace(spec, provenance={**spec.provenance, "steps": step})
            place = storage.join(output, "model")
            display.phase(f"writing the model to {place}")
            exported = written(lambda: save_model(place, weights, spec), f"{place} can't be written")
            if mine:
                gpus = config.gpus_per_worker * gpu
                written(
                    lambda: draw_exported(output, config.seed, gpus),
                    f"{SAMPLES} can't be written to {output}",
                )
                tracker.log_file(SAMPLES)
                display.phase("logging the model in MLflow")
                tracker.log_model(exported, config.register, config.alias)
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


def draw_exported(output: str, seed: int, gpus: float) -> None:
    """Draws samples of a run's exported model into its output. The model's description in MLflow shows them.

    Args:
        gpus: GPUs that each worker of the run had; 0 = this process draws on its CPUs. Else a task with as many GPUs
            draws, because a head node's CPUs are slow with a large network. If the task is not done in
            `DRAWING_WAITS_SECONDS`, or fails, this process draws after all.
    """
    if gpus:
        task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(_draw_exported)
        drawn = task.remote(output, seed, "cuda")
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(drawn, timeout=DRAWING_WAITS_SECONDS)
            return
        ray.cancel(drawn, force=True)
    _draw_exported(output, seed, "cpu")


def _draw_exported(output: str, seed: int, device: str) -> None:
    # matplotlib takes a second to import, so it must not be imported before the first step.
    from pipeline.pictures.draw import file_of
    from pipeline.pictures.make import draw_samples

    model, spec = load_model(storage.join(output, "model"))
    if torch.cuda.is_available():  # Ray may know of GPUs that torch can't use
        model = model.to(device)
    rows = max(1, 128 // max(32, spec.image.size))  # large images take long on a head node without a GPU
    picture = file_of(lambda path: draw_samples(model, spec, path, rows=rows, seed=seed))
    storage.write_atomic(storage.join(output, SAMPLES), picture)


@dataclass(frozen=True)
class _Job:
    """The arguments of `train`, and what it has opened."""

    config: TrainConfig
    data: Splits
    spec: ModelSpec
    output: str
    tracker: Tracker
    display: Display
    callbacks: Sequence[Any]
    on_point: Callable[[int, dict[str, float]], None]
    hooks: worker.Hooks


def _train(job: _Job) -> tuple[dict[str, Tensor], int, dict[str, float]]:
    """Runs Ray Train to the last step, or until the caller's watch ends the run.

    Returns:
        the weights to export, the steps that trained them, and the last value of each figure.
    """
    config, note = job.config, job.display.note
    folder = storage.join(job.output, CHECKPOINTS)
    patient = partial(patiently, seconds=config.storage_patience, say=note)
    mend(folder, patient)
    channel = open_channel(read_quarantine(job.output))
    try:
        trainer = _trainer(job, channel)
        with ChannelReader(channel, job.output, job.display, job.tracker, job.on_point) as reader:
            job.display.phase(f"starting {config.workers} worker{'s' * (config.workers > 1)}")
            try:
                with announced(room_needed(config, bool(config.gpu)), note), no_cleaner_without_dashboard():
                    result, signal_number = run_until_signal(trainer.fit, channel, note)
            except (ray.exceptions.RayError, ray.train.TrainingFailedError):
                release_orphans()
                _raise_reason(channel)
                raise
            _raise_reason(channel)
        found = newest_whole(folder, checkpoint.read_model, patient, note)
        weights, step = found[1] if found else ({}, 0)
        kept = [entry for entry, _ in result.best_checkpoints or []]
        patient(lambda: sweep(folder, kept), f"checkpoints in {folder} can't be removed")
        if signal_number and step < config.steps:
            raise Interrupted(
                f"stopped at step {step} of {config.steps}, which is saved; go on with --resume",
                signal_number,
            )
        if step < config.steps and job.hooks.watch is None:
            raise InputError(
                f"the checkpoint of step {config.steps} in {folder} is damaged: go on with --resume"
            )
        return weights, step, reader.latest
    finally:
        ray.kill(channel)


def _raise_reason(channel: Any) -> None:
    """Raises the error with which a worker ended the run, if there is one."""
    if reason := ray.get(channel.reason_to_give_up.remote()):
        raise reason


def _trainer(job: _Job, channel: Any) -> TorchTrainer:
    config, spec, output = job.config, job.spec, job.output
    if config.min_workers:
        # Seconds that Ray waits for a dead node's resources before it continues with fewer workers; 60 by default.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    index = job.data["train"]
    plan = index.plan(config.seed, config.batch_size)
    if warning := index.poorly_mixed(plan):
        print(warning, file=sys.stderr, flush=True)
    planned = share(index, plan)
    gpu = bool(config.gpu)
    filesystem, path = arrow_fs(output, PatientOnChannel(channel, config.storage_patience))
    validation, scored = None, {}
    if config.validate_every:
        train = index if set(config.validate_metrics) - {"bits"} else None
        validation = ValidationConfig(
            Validator(config, spec, job.data["validation"], output, channel, train),
            ray_remote_kwargs=SpareResources(config, gpu),
        )
        scored = {"checkpoint_score_attribute": BITS_PER_DIM, "checkpoint_score_order": "min"}
    return TorchTrainer(
        worker.train_loop_per_worker,
        train_loop_config={
            "task": worker.Task(config, spec, output, channel, job.tracker.run.id, index.rows, job.hooks)
        },
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
            callbacks=[SaveBeforeShutdown(channel), *job.callbacks],
        ),
        datasets={"train": lambda: planned},
        dataset_config=PlannedData(config.readers, config.random_crop),
        validation_config=validation,
    )


def room_needed(config: TrainConfig, gpu: bool) -> Need:
    """The smallest number of workers, and their resources, with which a run continues.

    Args:
        gpu: True if the workers use GPUs.
    """
    least = config.min_workers or config.workers
    each = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker * gpu}
    count = f"--min-workers {least}" if config.min_workers else f"--workers {least}"
    share = "" if config.gpus_per_worker == 1 else f" --gpus-per-worker {config.gpus_per_worker:g}"
    flags = f"{count} --cpus-per-worker {config.cpus_per_worker:g}{f' --gpu{share}' * gpu}"
    reserved = {name: amount for name, amount in each.items() if amount}
    return Need(least, reserved, TRAIN_WORKERS, flags)
