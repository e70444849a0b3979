"""A training run from the driver's side: checks, MLflow, Ray Train, the exported model."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, DataConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import __version__, tracking
from pipeline.config import ModelSpec, TrainConfig, to_dict
from pipeline.data.index import DatasetIndex, open_dataset
from pipeline.data.plan import Plan
from pipeline.data.storage import check_writable
from pipeline.data.stream import RankStream
from pipeline.diffusion.schedules import make_betas, resolve
from pipeline.display import Display
from pipeline.errors import InputError
from pipeline.models.ema import power_gamma
from pipeline.models.export import save_model
from pipeline.models.unet import check_model
from pipeline.training import checkpoint, worker
from pipeline.training.progress import Courier, open_mailbox

RAY_FOLDER = "checkpoints"
RUN_FILE = "run.json"
SNAPSHOTS = "snapshots"


class PlannedData(DataConfig):
    """Hands each rank its part of the plan, anew at every start or resize of the worker group."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan

    def configure(
        self, datasets: dict[str, Any], world_size: int, *_: object, **__: object
    ) -> list[dict[str, Any]]:
        return [
            {name: RankStream(index, self._plan, rank, world_size) for name, index in datasets.items()}
            for rank in range(world_size)
        ]


@dataclass(frozen=True)
class Trained:
    """What a run leaves behind."""

    run: tracking.Run
    folder: Path
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


def check(config: TrainConfig) -> tuple[DatasetIndex, ModelSpec]:
    """Everything that can be known to be wrong before a cluster is asked for anything.

    Raises:
        InputError: in one line, what to change.
    """
    for name in ("steps", "workers", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
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
    index = open_dataset(config.data)
    spec = make_spec(config, index)
    make_betas(spec.diffusion)
    check_model(spec.model, spec.image)
    check_writable(config.output)
    return index, spec


def train(config: TrainConfig, hooks: worker.Hooks = worker.Hooks()) -> Trained:  # noqa: B008  (frozen)
    """Trains, or goes on training, and exports the averaged model to `OUTPUT/model`.

    Raises:
        InputError: see `check`; also a run in `output` that was not to be resumed, or with other settings.
    """
    index, spec = check(config)
    output = Path(config.output).absolute()
    run = _open_run(config, spec, index, output, hooks.run_id)
    plan = Plan(tuple(g.rows for g in index.groups), config.seed, config.batch_size, config.groups_per_window)
    mailbox = open_mailbox()
    gpu = _use_gpu(config)
    trainer = TorchTrainer(
        worker.run,
        train_loop_config={
            "config": config,
            "spec": spec,
            "mailbox": mailbox,
            "run_id": run.id,
            "hooks": hooks,
            "snapshots": str(output / SNAPSHOTS),
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.workers) if config.min_workers else config.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, "GPU": int(gpu)},
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=str(output),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            failure_config=FailureConfig(max_failures=config.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
        datasets={"train": lambda: index},
        dataset_config=PlannedData(plan),
    )
    display = Display("train", config.steps, "steps")

    def deliver(points: list[Any]) -> None:
        tracking.log_points(run, [point for point in points if point[1] > run.last_step])

    try:
        with Courier(mailbox, display, deliver) as courier:
            result = trainer.fit()
            if reason := ray.get(mailbox.reason_to_stop.remote()):
                raise InputError(reason)
    except (ray.train.TrainingFailedError, InputError):
        tracking.end_run(run, "FAILED")
        raise
    finally:
        ray.kill(mailbox)
    folder = _export(result.checkpoint, spec, output)
    model = str(folder)
    if hooks.log_model:
        logged = tracking.log_model(run, folder, config.register, config.alias)
        model = logged if config.register else model
    return Trained(run, folder, spec, model, courier.latest)


def _open_run(
    config: TrainConfig, spec: ModelSpec, index: DatasetIndex, output: Path, run_id: str
) -> tracking.Run:
    """One MLflow run for one output folder, whatever number of restarts."""
    note = output / RUN_FILE
    settings = to_dict(replace(config, resume=False))
    if note.exists():
        old = json.loads(note.read_text())
        if not config.resume:
            raise InputError(
                f"--output {config.output} already holds a run: pass --resume, or another folder"
            )
        for key, now in _fixed(config, spec, index).items():
            before = old["fixed"].get(key)
            if before != now:
                raise InputError(
                    f"--resume: {key} was {before} in {config.output} and is {now} now; keep it, or train in "
                    "another folder"
                )
        if run := tracking.reopen_run(run_id or old["run_id"], "loss"):
            return run
    run = (tracking.reopen_run(run_id, "loss") if run_id else None) or tracking.start_run(
        config.experiment,
        config.run_name,
        settings,
        {"ray_ddpm.version": __version__, "ray_ddpm.output": str(output)},
    )
    tracking.log_dataset(run, config.data, index.fingerprint, index.rows)
    tracking.log_config(run, settings)
    output.mkdir(parents=True, exist_ok=True)
    content = {"run_id": run.id, "fixed": _fixed(config, spec, index), "config": settings}
    partial = note.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(note)
    return run


def _fixed(config: TrainConfig, spec: ModelSpec, index: DatasetIndex) -> dict[str, Any]:
    """What can't change between a run and its resume without making it another run."""
    return {
        "data_fingerprint": index.fingerprint,
        "model": to_dict(spec.model),
        "diffusion": to_dict(spec.diffusion),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "groups_per_window": config.groups_per_window,
        "ema_decays": list(config.optimizer.ema_decays),
        "ema_lengths": list(config.optimizer.ema_lengths),
    }


def _export(newest: Any, spec: ModelSpec, output: Path) -> Path:
    with newest.as_directory() as folder:
        saved, _ = checkpoint.read(Path(folder))
    weights = saved.weights | saved.averages[0]
    return save_model(output / "model", weights, spec)


def _use_gpu(config: TrainConfig) -> bool:
    available = ray.cluster_resources().get("GPU", 0) >= config.workers
    if config.gpu and not available:
        raise InputError(f"--gpu: the cluster has fewer GPUs than --workers {config.workers}")
    return available if config.gpu is None else config.gpu
