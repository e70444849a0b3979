"""The run that an output folder holds: one MLflow run, with settings that a resume can't change."""

from dataclasses import replace
from functools import partial
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
from pipeline.output import check_claim, check_unclaimed, read_claim, write_claim
from pipeline.tracking import RUN_FILE, runs
from pipeline.tracking.tracker import FOLDER as UNDELIVERED
from pipeline.training.checkpoint_manager import CHECKPOINTS
from pipeline.training.run_channel import CURVES, QUARANTINE


def open_run(
    config: TrainConfig, spec: ModelSpec, index: DatasetIndex, output: str, run: runs.Run | None = None
) -> runs.Run:
    """Opens the one MLflow run of an output folder, the same one after any number of restarts.

    If the folder's run can't be resumed but has produced nothing yet, a new MLflow run replaces it. MLflow need not
    answer for a run that is resumed.

    Args:
        output: URI of the run.
        run: the MLflow run, if the caller has already opened it.

    Raises:
        InputError: the output holds a run and --resume was not given, or its settings differ, or MLflow does not answer
            for a new run.
    """
    settings, fixed = to_dict(replace(config, resume=False)), _fixed(config, spec, index)
    before = read_claim(output, RUN_FILE, beside=("run_id",))
    if before is not None:
        try:
            _check_same_run(before, config, fixed, index, output)
        except InputError:
            if _has_begun(before, output):
                raise

            def end() -> None:
                if old := runs.reopen_run(before["run_id"], ()):  # else somebody has deleted it
                    runs.end_run(old, "FAILED", reason="replaced before its first step")

            runs.wait_for_mlflow(end, config.tracking_patience)
            if storage.exists(bad := storage.join(output, QUARANTINE)):  # the data may have changed
                storage.remove(bad)
            storage.remove_folder(storage.join(output, UNDELIVERED))
        else:
            if run := run or runs.reopen_later(before["run_id"], CURVES):
                return run
    elif storage.list_folders(storage.join(output, CHECKPOINTS), "step-"):
        raise InputError(
            f"--output {output} holds checkpoints, but {RUN_FILE}, which says of which run, is lost: restore it, or "
            "choose another folder"
        )
    else:
        check_unclaimed(output, RUN_FILE)
    claim = partial(
        write_claim,
        output,
        RUN_FILE,
        fixed,
        config=settings,
        data_order=index.order,
        data_settings=index.settings,
    )
    if run:
        claim(run_id=run.id)
        return run
    tags = {"ray_ddpm.version": __version__, "ray_ddpm.output": output, **runs.origin("train")}
    name = config.run_name or run_name(config, spec)
    run = runs.open_run(config.experiment, name, tags, config.tracking_patience)
    with runs.failed_on_error(run):
        claim(run_id=run.id)
    return run


def run_name(config: TrainConfig, spec: ModelSpec) -> str:
    """The name of a run that the user did not name."""
    data, diffusion = storage.name(storage.title(config.data)), spec.diffusion
    return f"{data} {diffusion.schedule} T={diffusion.timesteps}"


def logged_settings(config: Any) -> dict[str, Any]:
    """Settings of a training or a search as parameters of its MLflow run.

    The data's title stands in place of its path, which would mean nothing to others.
    """
    return to_dict(replace(config, data=storage.title(config.data), resume=False))


def logged_config(config: TrainConfig) -> dict[str, Any]:
    """Settings as `--config` takes them, without a local path of the data, since other users have their own."""
    settings = to_dict(replace(config, resume=False))
    if storage.is_local(config.data):
        del settings["data"]
    return settings


def _check_same_run(
    before: dict[str, Any], config: TrainConfig, fixed: dict[str, Any], index: DatasetIndex, output: str
) -> None:
    """Refuses to resume a run whose settings differ, or without --resume.

    Args:
        before: the claim in the output, see `read_claim`.
        fixed: settings that a resume can't change.

    Raises:
        InputError: says what to do.
    """
    if not config.resume:
        raise InputError(
            f"--output {config.output} already holds a run: pass --resume, or choose another folder"
        )
    # An older release may have written the claim. Fields that it did not have get their defaults.
    for name, cls in (("image", ImageConfig), ("model", ModelConfig), ("diffusion", DiffusionConfig)):
        before["fixed"][name] = to_dict(from_dict(cls, before["fixed"].get(name, {}), RUN_FILE))
    _check_order(before, index, config)
    check_claim(output, before, fixed)


def _has_begun(before: dict[str, Any], output: str) -> bool:
    """True if a run has a checkpoint, complete or not, or a point of its curves, or if MLflow does not answer."""
    written = storage.list_folders(storage.join(output, CHECKPOINTS), "step-")
    return bool(written) or runs.has_points(before["run_id"], CURVES)


def _check_order(before: dict[str, Any], index: DatasetIndex, config: TrainConfig) -> None:
    """Refuses data in another order, because a resume would skip some images and see others twice.

    Raises:
        InputError: says how to restore the data's former order.
    """
    if before.get("data_order", index.order) == index.order:
        return
    then = before.get("data_settings")
    if not then or not index.settings:
        what = "its files, or their row groups, differ from those that the run started with: restore them"
    else:
        flags = {
            f"--{name.replace('_', '-')} {value}"
            for name, value in then.items()
            if index.settings.get(name) != value
        }
        again = " ".join(sorted(flags)) or "the former input"
        what = f"it was prepared again since the run started: prepare it with jobs/prepare.py and {again}"
    raise InputError(f"--data {config.data}: {what}, or choose another --output")


def _fixed(config: TrainConfig, spec: ModelSpec, index: DatasetIndex) -> dict[str, Any]:
    """The settings that a resume can't change."""
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
