"""Settings refused before a run claims its output, and runs that may start over in a claimed output."""

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.config import DiffusionConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipeline.data.index import open_splits
from pipeline.errors import InputError
from pipeline.tracking import RUN_FILE, runs
from pipeline.training import checkpoint
from pipeline.training.checks import check, check_fit
from pipeline.training.identity import open_run
from pipeline.training.run_channel import QUARANTINE
from tests.jobs.common import database

ROWS = 1620  # images to train on


@pytest.fixture
def config(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database(tmp_path))
    model = ModelConfig(32, (1, 2), res_blocks=1, attention_resolutions=(4,))
    return TrainConfig(
        str(digits), str(tmp_path / "run"), model=model, diffusion=DiffusionConfig(timesteps=5)
    )


def test_a_wrong_schedule_is_refused_before_the_data_is_opened(config: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"liner.*linear"):
        check(replace(config, data="nowhere", diffusion=DiffusionConfig(schedule="liner")))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": ROWS + 1}, f"--batch-size {ROWS + 1} is more than the {ROWS} images to train on"),
        ({"steps": 10**9 - 1, "batch_size": ROWS}, r"--steps 999999999 are more than 16777216 epochs of"),
        ({"workers": 3, "batch_size": 2}, "--batch-size 2 is the global batch .* give at least 3"),
        ({"workers": 2, "min_workers": 3}, "--min-workers 3 is more than --workers 2: give at most 2"),
        ({"microbatch": -1}, "--microbatch -1: must be at least 0"),
        ({"optimizer": OptimizerConfig(ema_decays=())}, "--ema-decays needs at least one value"),
        ({"optimizer": OptimizerConfig(adam_betas=(0.9, 1.0))}, "--adam-betas 1.0: must be"),
        (
            {"diffusion": DiffusionConfig(variance="learned_range")},
            "--loss simple does not train --variance learned",
        ),
        ({"diffusion": DiffusionConfig(loss="hybrid")}, "--loss hybrid trains --variance learned_range"),
        ({"diffusion": DiffusionConfig(betas=(2.0, 3.0))}, "betas: given together"),
        (
            {"diffusion": DiffusionConfig(schedule="linear", beta_start=1e-18)},
            "--beta-start|betas: .*so small",
        ),
        ({"model": ModelConfig(33)}, "--model-channels 33 must be even: give 32 or 34"),
        ({"model": ModelConfig(channel_multipliers=())}, "--channel-multipliers needs at least one"),
        (
            {"model": ModelConfig(head_channels=24)},
            r"24 does not divide the \d.* channels .*: give 8, 16 or 32",
        ),
        (
            {"model": ModelConfig(24, (1,), head_channels=7)},
            "does not divide the 24 channels .*: give 4, 6 or 8",
        ),
        ({"model": ModelConfig(channel_multipliers=(1,) * 5)}, "can't be halved 4 times"),
        ({"validate_every": 1, "validation_images": 1}, "at least two held-out images"),
        ({"validate_every": 1, "validation_terms": 3}, "--validation-terms 3 must be even: give 2 or 4"),
        ({"validate_every": 1, "validate_metrics": ("frechet",)}, "--validate-metrics needs bits"),
        (
            {"validate_every": 1, "validate_metrics": ("bits", "cas")},
            "--validate-metrics cas needs --class-cond",
        ),
        (
            {"validate_every": 1, "validate_metrics": ("bits", "frechet"), "validation_features": "no.pt"},
            "--validation-features no.pt: can't be read",
        ),
    ],
)
def test_settings_that_cannot_work_together_or_on_the_data_leave_the_output_alone(
    config: TrainConfig, changes: dict[str, Any], says: str
) -> None:
    check(config)
    with pytest.raises(InputError, match=says) as error:
        check(replace(config, **changes))
    assert "\n" not in str(error.value)
    assert not Path(config.output).exists()


def test_a_batch_of_all_images_and_a_microbatch_beyond_it_can_be_trained(config: TrainConfig) -> None:
    check(replace(config, batch_size=ROWS, microbatch=10**6))


def begin(config: TrainConfig) -> runs.Run:
    """Open a run as the driver does before workers start."""
    data = open_splits(config.data)
    return open_run(config, check_fit(config, data), data["train"], config.output)


def status(run: runs.Run) -> str:
    return str(runs.open_client().get_run(run.id).info.status)


def test_a_run_without_a_step_begins_anew_with_other_settings(config: TrainConfig) -> None:
    first = begin(config)
    storage.write_atomic(storage.join(config.output, QUARANTINE), b'{"path": "a", "reason": "b"}\n')
    second = begin(replace(config, batch_size=64, seed=1))
    assert second.id != first.id
    assert (status(first), status(second)) == ("FAILED", "RUNNING")
    assert not storage.exists(storage.join(config.output, QUARANTINE))
    assert begin(replace(config, batch_size=64, seed=1, resume=True)).id == second.id
    runs.open_client().delete_run(second.id)
    third = begin(replace(config, resume=True))  # as a retried job passes it anyway
    assert third.id not in (first.id, second.id)


def test_a_run_whose_output_cannot_be_written_is_not_left_running(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(uri: str, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", uri)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomic", full)
        with pytest.raises(InputError, match=r"run\.json can't be written: No space left on device"):
            begin(config)
    (experiment,) = runs.open_client().search_experiments(filter_string=f"name = '{config.experiment}'")
    (run,) = runs.open_client().search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert "No space left on device" in run.data.tags["ray_ddpm.reason"]
    assert status(begin(config)) == "RUNNING"


def a_checkpoint(config: TrainConfig, run: runs.Run) -> None:
    uri = storage.join(config.output, "checkpoints", checkpoint.new_name(1))
    storage.write_atomic(storage.join(uri, "state.json"), b"damaged")


def a_point(config: TrainConfig, run: runs.Run) -> None:
    runs.log_points(run, [(0, 1, {"loss": 1.0})])


def lost_by_mlflow(config: TrainConfig, run: runs.Run) -> None:
    claim = Path(config.output) / RUN_FILE
    claim.write_text(claim.read_text().replace(run.id, "0" * 32))


@pytest.mark.parametrize("happens", [a_checkpoint, a_point, lost_by_mlflow])
def test_a_run_that_may_have_made_a_step_does_not_begin_anew(
    config: TrainConfig, happens: Callable[[TrainConfig, runs.Run], None]
) -> None:
    happens(config, begin(config))
    before = (Path(config.output) / RUN_FILE).read_bytes()
    with pytest.raises(InputError, match="already holds a run: pass --resume"):
        begin(config)
    with pytest.raises(InputError, match="was begun with batch_size = 128, now it is 64"):
        begin(replace(config, batch_size=64, resume=True))
    assert (Path(config.output) / RUN_FILE).read_bytes() == before
