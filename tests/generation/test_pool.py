"""The pool of actors writes what one process writes."""

from pathlib import Path

import pytest
import ray

from pipeline.errors import InputError
from pipeline.generation import pool
from tests.generation.common import config, digests, make
from tests.generation.test_sampler import with_bias

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.parametrize("actors", [1, 2])
def test_any_number_of_actors_writes_the_same_bytes(
    actors: int, model: Path, whole: Path, tmp_path: Path
) -> None:
    made = make(config(tmp_path, actors=actors), model, pool.actor_pool)
    assert made["metrics"]["generated"] == 40
    assert digests(tmp_path) == digests(whole)


def test_the_pool_scales_between_its_limits_and_never_beyond_its_work() -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    assert pool.pool_size(config("o"), 1000) == (1, cpus)
    assert pool.pool_size(config("o", actors=3), 1000) == (3, 3)
    assert pool.pool_size(config("o", min_actors=2, max_actors=5), 1000) == (2, 5)
    assert pool.pool_size(config("o", min_actors=2, max_actors=5), 3) == (2, 3)
    assert pool.pool_size(config("o", actors=3), 1) == (1, 1)


def test_a_gpu_that_the_cluster_lacks_is_refused(model: Path, tmp_path: Path) -> None:
    if ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="the cluster has no GPU"):
        make(config(tmp_path, gpu=True), model, pool.actor_pool)


def test_what_goes_wrong_in_an_actor_ends_the_job_with_one_line(model: Path, tmp_path: Path) -> None:
    bad = with_bias(model, tmp_path / "bad", float("nan"))
    with pytest.raises(InputError, match="are blank or not finite"):
        make(config(tmp_path / "out", guidance=1.0), bad, pool.actor_pool)
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "notes").write_text("a file where a folder has to be")
    with pytest.raises(InputError, match="run the same command again; what is finished is kept"):
        make(config(tmp_path / "blocked"), model, pool.actor_pool)
