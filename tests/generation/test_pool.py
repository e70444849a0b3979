"""The pool of actors writes what one process writes."""

from pathlib import Path

import pytest

from pipeline.cluster.pool import ActorPool
from pipeline.errors import InputError
from pipeline.generation.job import actor_pool
from tests.generation.common import config, digests, make
from tests.generation.test_sampler import with_bias


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
    bad = with_bias(model, tmp_path / "bad", float("nan"))
    settings = config(tmp_path / "out", guidance=1.0)
    with pytest.raises(InputError, match="are blank or not finite"):
        make(settings, bad, actor_pool(settings))
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "notes").write_text("a file where a folder has to be")
    settings = config(tmp_path / "blocked")
    with pytest.raises(InputError, match="run the same command again; what is finished is kept"):
        make(settings, model, actor_pool(settings))
