"""Settings of a search: refusals, and the positions of rungs."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import disk_cache
from pipeline.commands import cli, tune
from pipeline.config import TrainConfig
from pipeline.errors import InputError
from pipeline.tuning.config import TuneConfig, base, check, finished, rung_images, rung_steps

CONFIG = TuneConfig(data="d", output="o")


@pytest.mark.parametrize("name", ["loss", "MSE", "training-mse"])
def test_the_training_loss_is_refused_as_an_objective_with_the_reason(name: str) -> None:
    with pytest.raises(InputError, match="scale depends on the schedule"):
        check(replace(CONFIG, objective=name))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"objective": "beauty"}, "bits, frechet, both"),
        ({"trials": 0}, "--trials"),
        ({"terms": 7}, "--terms"),
        ({"reduction": 1}, "--reduction"),
        ({"max_images": 1}, "--max-images"),
        ({"images": 5, "rungs": 4}, "--images 5"),
        ({"cpus_per_worker": 0.0}, "--cpus-per-worker"),
    ],
)
def test_settings_that_make_no_sense_are_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        check(replace(CONFIG, **change))  # type: ignore[arg-type]


def test_what_trials_read_of_remote_data_is_kept_on_every_node(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job sets environment variables, since a flag of a trial would come too late for the reading processes."""
    joined = list[dict[str, str]]()

    def connect() -> None:
        raise InputError("far enough")

    def connect_later(verbose: bool, environment: dict[str, str], workers: str, soon: bool) -> None:
        joined.append(environment)

    monkeypatch.setattr(cli, "connect_later", connect_later)
    monkeypatch.setattr(cli, "connect_now", connect)
    monkeypatch.setattr(cli, "open_tracking", lambda: None)
    flags = ["--data", str(digits), "--output", str(tmp_path / "out")]
    cache = str(tmp_path / "cache")
    assert tune.main([*flags, "--cache-dir", cache, "--cache-gb", "2"]) == 2
    assert joined[0].items() >= disk_cache.environment(cache, 2).items()
    assert base(replace(CONFIG, cache_dir=cache)).cache_dir == cache
    (tmp_path / "space.yaml").write_text("{cache_dir: cache, schedule: [cosine, linear]}")
    assert tune.main([*flags, "--space", str(tmp_path / "space.yaml")]) == 2
    assert "'cache_dir' is set by the search itself (see jobs/tune.py --help)" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [64, 100, 128, 1000, 1500])
def test_rungs_are_the_same_images_for_every_batch_size_up_to_half_a_batch(batch_size: int) -> None:
    config = replace(CONFIG, images=9000, rungs=3, reduction=3)
    assert rung_images(config) == [1000, 3000, 9000]
    steps = rung_steps(config, batch_size)
    assert list(steps.values()) == [1000, 3000, 9000]
    assert all(abs(step * batch_size - images) <= batch_size / 2 for step, images in steps.items())
    trial = finished(config, TrainConfig(data="d", output="o", batch_size=batch_size))
    assert trial.steps == max(steps)


def test_a_large_batch_trains_on_no_more_images_than_it_is_said_to() -> None:
    config = replace(CONFIG, images=10_240)
    assert rung_steps(config, 1024) == {1: 1138, 3: 3414, 10: 10_240}
    assert finished(config, TrainConfig("d", "o", batch_size=1024)).steps == 10


def test_rungs_that_a_batch_size_can_not_tell_apart_are_refused() -> None:
    with pytest.raises(
        InputError, match="--batch-size 4096 is too large to tell the rungs at 1138, 3414, 10240"
    ):
        rung_steps(replace(CONFIG, images=10_240), 4096)
