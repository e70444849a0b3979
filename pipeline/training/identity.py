"""Which run an output folder holds: one MLflow run, with settings that a resume can't change."""

from dataclasses import replace
from typing import Any

from pipeline import __version__, storage
from pipeline.config import (
    DiffusionConfig,
    ImageConfig,
    ModelConfig,
    ModelSpec,
    TrainConfig,
    from_dict,
    to_dict,
)
from pipeline.data.index import DatasetIndex
from pipeline.errors import InputError
from pipeline.output import check_claim, read_claim, write_claim
from pipeline.tracking import RUN_FILE, runs
from pipeline.tracking.tracker import FOLDER as UNDELIVERED
from pipeline.training.checkpoint_manager import CHECKPOINTS
from pipeline.training.run_channel import CURVES, QUARANTINE


def open_run(
    config: TrainConfig, spec: ModelSpec, index: DatasetIndex, output: str, run: runs.Run | None = None
) -> tuple[runs.Run, bool]:
    """One MLflow run for one output folder, whatever number of restarts.

    A run that has made nothing yet begins anew where it can't go on: in another MLflow run.

    Args:
        run: where the caller has opened it.

    Returns:
        the run, and whether it is new. MLflow need not answer for one that is resumed.

    Raises:
        InputError: the output holds a run that was not to be resumed, or that has other settings; or MLflow does not
            answer.
    """
    settings, fixed = to_dict(replace(config, resume=False)), _fixed(config, spec, index)
    before = read_claim(output, RUN_FILE)
    if before is not None:
        try:
            _check_same_run(before, config, fixed, index, output)
        except InputError:
            if _has_begun(before, output):
                raise

            def end() -> None:
                if old := runs.reopen_run(before["run_id"], ()):  # else somebody has deleted it
                    runs.end_run(old, "FAILED", reason="begun anew before its first step")

            runs.wait_for_mlflow(end, config.tracking_patience)
            if storage.exists(bad := storage.join(output, QUARANTINE)):  # of data that may be others now
                storage.remove(bad)
            storage.remove_folder(storage.join(output, UNDELIVERED))
        else:
            if run := run or runs.reopen_later(before["run_id"], CURVES):
                return run, False
    tags = {"ray_ddpm.version": __version__, "ray_ddpm.output": output, **runs.origin("train")}
    name = config.run_name or run_name(config, spec)
    run = run or runs.open_run(config.experiment, name, tags, config.tracking_patience)
    write_claim(
        output,
        RUN_FILE,
        fixed,
        run_id=run.id,
        config=settings,
        data_order=index.order,
        data_settings=index.settings,
    )
    return run, True


def run_name(config: TrainConfig, spec: ModelSpec) -> str:
    """What a run is called where the user gave it no name."""
    data, diffusion = storage.name(storage.title(config.data)), spec.diffusion
    return f"{data} {diffusion.schedule} T={diffusion.timesteps}"


def logged_settings(config: Any) -> dict[str, Any]:
    """Settings, of a training or a search, as parameters of its run: a path of the data would say nothing to others."""
    return to_dict(replace(config, data=storage.title(config.data), resume=False))


def logged_config(config: TrainConfig) -> dict[str, Any]:
    """Settings as `--config` takes them, but for the path of the data on this machine: who trains again gives theirs."""
    settings = to_dict(replace(config, resume=False))
    if storage.is_local(config.data):
        del settings["data"]
    return settings


def _check_same_run(
    before: dict[str, Any], config: TrainConfig, fixed: dict[str, Any], index: DatasetIndex, output: str
) -> None:
    """Refuses to go on with what is another run, or was not to be resumed.

    Raises:
        InputError: says what to do.
    """
    if not config.resume:
        raise InputError(
            f"--output {config.output} already holds a run: pass --resume, or choose another folder"
        )
    # Fields that the release which began the run did not have are at their defaults.
    for name, cls in (("image", ImageConfig), ("model", ModelConfig), ("diffusion", DiffusionConfig)):
        before["fixed"][name] = to_dict(from_dict(cls, before["fixed"][name], RUN_FILE))
    _check_order(before, index, config)
    check_claim(output, before, fixed)


def _has_begun(before: dict[str, Any], output: str) -> bool:
    """Whether a run has a checkpoint, whole or not, or a point of its curves; also where MLflow can't say."""
    written = storage.list_folders(storage.join(output, CHECKPOINTS), "step-")
    return bool(written) or runs.has_points(before["run_id"], CURVES)


def _check_order(before: dict[str, Any], index: DatasetIndex, config: TrainConfig) -> None:
    """Refuses the same images in another order: a resume would skip some and see others twice.

    Raises:
        InputError: says which command makes the data as it was.
    """
    if before.get("data_order", index.order) == index.order:
        return
    then = before.get("data_settings")
    if not then or not index.settings:
        what = "its files are others, or cut otherwise, than those that the run was begun on: restore them"
    else:
        flags = {
            f"--{name.replace('_', '-')} {value}"
            for name, value in then.items()
            if index.settings.get(name) != value
        }
        again = " ".join(sorted(flags)) or "the input as it was"
        what = f"it was prepared anew since the run was begun: prepare it with jobs/prepare.py and {again}"
    raise InputError(f"--data {config.data}: {what}, or choose another --output")


def _fixed(config: TrainConfig, spec: ModelSpec, index: DatasetIndex) -> dict[str, Any]:
    """What can't change between a run and its resume without making it another run."""
    return {
        "data_fingerprint": index.fingerprint,
        "image": to_dict(spec.image),
        "model": to_dict(spec.model),
        "diffusion": to_dict(spec.diffusion),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "lanes": index.plan(config.seed, config.batch_size).lanes,
        "ema_decays": list(config.optimizer.ema_decays),
        "ema_lengths": list(config.optimizer.ema_lengths),
    }
