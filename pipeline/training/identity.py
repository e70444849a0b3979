"""Which run an output folder holds: one MLflow run, with settings that a resume can't change."""

import json
from dataclasses import replace
from typing import Any

from pipeline import __version__, storage
from pipeline.config import ModelSpec, TrainConfig, to_dict
from pipeline.data.index import DatasetIndex
from pipeline.errors import InputError
from pipeline.tracking import runs
from pipeline.training.run_channel import CURVES

RUN_FILE = "run.json"


def open_run(
    config: TrainConfig, spec: ModelSpec, index: DatasetIndex, output: str, run_id: str = ""
) -> runs.Run:
    """One MLflow run for one output folder, whatever number of restarts; `run_id` where the caller opened it."""
    note = storage.join(output, RUN_FILE)
    settings = to_dict(replace(config, resume=False))
    if storage.exists(note):
        old = json.loads(storage.read_bytes(note))
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
        if run := runs.reopen_run(run_id or old["run_id"], CURVES):
            return run
    run = (runs.reopen_run(run_id, CURVES) if run_id else None) or runs.start_run(
        config.experiment,
        config.run_name,
        settings,
        {"ray_ddpm.version": __version__, "ray_ddpm.output": output},
    )
    runs.log_dataset(run, config.data, index.fingerprint, index.rows, index.quarantined)
    runs.log_config(run, settings)
    content = {"run_id": run.id, "fixed": _fixed(config, spec, index), "config": settings}
    storage.write_atomic(note, json.dumps(content, indent=1).encode())
    return run


def _fixed(config: TrainConfig, spec: ModelSpec, index: DatasetIndex) -> dict[str, Any]:
    """What can't change between a run and its resume without making it another run."""
    return {
        "data_fingerprint": index.fingerprint,
        "image": to_dict(spec.image),
        "model": to_dict(spec.model),
        "diffusion": to_dict(spec.diffusion),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "groups_per_window": config.groups_per_window,
        "ema_decays": list(config.optimizer.ema_decays),
        "ema_lengths": list(config.optimizer.ema_lengths),
    }
