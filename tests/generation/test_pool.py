"""The pool of actors writes what one process writes."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cluster.pool import ActorPool
from pipeline.errors import InputError
from pipeline.generation.job import actor_pool
from tests.generation.common import config, digests, make, times
from tests.generation.test_sampler import with_bias
from tests.jobs.common import Outcome


@pytest.mark.parametrize("actors", [1, 2])
def test_any_number_of_actors_writes_the_same_bytes(
    cluster: None, actors: int, model: Path, whole: Path, tmp_path: Path
) -> None:
    settings = config(tmp_path, actors=actors)
    assert make(settings, model, actor_pool(settings))["metrics"]["generated"] == 40
    assert digests(tmp_path) == digests(whole)


def test_the_flags_decide_the_size_of_the_pool() -> None:
    plain = ActorPool(0, False, 1, cpus=1, ordered=False)
    assert actor_pool(config("o")) == plain
    assert actor_pool(config("o", actors=3)).size(8, 1000) == (3, 3)
    assert actor_pool(config("o", min_actors=2, max_actors=5)).size(8, 1000) == (2, 5)
    assert actor_pool(config("o", gpu=True)).gpu


def test_what_goes_wrong_in_an_actor_ends_the_job_with_one_line(
    cluster: None, model: Path, tmp_path: Path
) -> None:
    bad = with_bias(model, tmp_path / "bad", float("inf"))
    settings = config(tmp_path / "out", guidance=1.0)
    with pytest.raises(InputError, match="are blank or not finite"):
        make(settings, bad, actor_pool(settings))
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "notes").write_text("a file where a folder has to be")
    settings = config(tmp_path / "blocked")
    with pytest.raises(InputError, match="run the same command again; finished files are kept"):
        make(settings, model, actor_pool(settings))


def test_a_full_disk_is_named_and_the_same_command_goes_on_when_there_is_room(
    model: Path, whole: Path, tmp_path: Path, job: Callable[..., Outcome]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    flags = (
        "--model", model, "--output", disk / "samples", "--count", 40, "--batch-size", 4, "--rows-per-file", 8,
        "--seed", 3, "--guidance", 1.5, "--actors", 1,
    )  # fmt: skip
    try:
        full = job("generate", *flags, home=tmp_path)
        assert full.code == 2, full.stderr
        assert "No space left on device: solve this and run the same command again" in full.stderr
        kept = times(disk / "samples")
        noted = {
            path.name.removesuffix(".json") for path in (disk / "samples" / "notes").glob("train-*.json")
        }
        kept = {name: written for name, written in kept.items() if name in noted}
        assert kept
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        done = job("generate", *flags, home=tmp_path)
        assert done.code == 0, done.stderr
        assert times(disk / "samples").items() >= kept.items()
        assert digests(disk / "samples") == digests(whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
