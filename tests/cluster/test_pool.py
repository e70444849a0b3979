"""Each task gives one result whatever happens to the actors, and an InputError in an actor reaches the driver."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from pipeline.cluster.pool import ActorPool, in_process
from pipeline.cluster.session import connect
from pipeline.errors import InputError, Outage
from pipeline.evaluation.work import cut
from tests.data.common import leave_ray

GROWING = ActorPool(2, gpu=False, least=1, ordered=False)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    mine = not ray.is_initialized()
    connect()
    yield
    if mine:
        leave_ray()


@dataclass(frozen=True)
class Squares:
    """Squares its ids. The first process that gets id 5 is killed; ids over 100 raise Outage."""

    killed: Path

    def start(self, device: str) -> Callable[[np.ndarray], dict[str, Any]]:
        def do(ids: np.ndarray) -> dict[str, Any]:
            if 5 in ids and not self.killed.exists():
                self.killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if ids.max() > 100:
                raise Outage("an id over 100")
            rounded = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
            how = {"threads": torch.get_num_threads(), "rounded": rounded}
            return {"ids": ids, "squares": ids.astype(np.float64) ** 2, **how}

        return do


@dataclass(frozen=True)
class Unfit:
    """Raises InputError on start."""

    def start(self, device: str) -> Callable[[int], int]:
        raise InputError(f"nothing to do on a {device}")


@pytest.mark.parametrize("pool", [ActorPool(2, gpu=False), GROWING], ids=["fixed", "growing"])
def test_results_are_complete_when_an_actor_is_killed_and_in_order_where_that_is_asked_for(
    pool: ActorPool, tmp_path: Path
) -> None:
    tasks = cut(np.arange(23), 4)
    parts = list(pool(Squares(tmp_path / "killed"), tasks))
    assert (tmp_path / "killed").exists()
    if not pool.ordered:
        parts.sort(key=lambda part: part["ids"][0])
    alone = list(in_process(Squares(tmp_path / "killed"), tasks))
    for part, same in zip(parts, alone, strict=True):
        np.testing.assert_array_equal(part["ids"], same["ids"])
        np.testing.assert_array_equal(part["squares"], same["squares"])
    # One thread per actor, so that sums are the same on any machine.
    assert {part["threads"] for part in parts} == {1}
    # No TF32: fp32 on a GPU stays fp32 whatever torch's default is.
    assert not any(part["rounded"] for part in parts)


@pytest.mark.parametrize("pool", [ActorPool(1, gpu=False), GROWING], ids=["fixed", "growing"])
def test_bad_input_in_an_actor_is_bad_input_here(pool: ActorPool, tmp_path: Path) -> None:
    """It keeps its kind: after an outage, a further attempt is made."""
    with pytest.raises(Outage, match=r"^an id over 100$"):
        list(pool(Squares(tmp_path / "killed"), [np.array([200])]))
    with pytest.raises(InputError, match=r"^nothing to do on a cpu$") as refused:
        list(pool(Unfit(), [1, 2]))
    assert type(refused.value) is InputError


def test_a_gpu_that_the_cluster_lacks_is_refused() -> None:
    if ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="the cluster has no GPU"):
        list(ActorPool(gpu=True)(Unfit(), [1]))


def test_a_pool_keeps_within_its_limits_and_has_never_more_actors_than_tasks() -> None:
    for pool, units, tasks, size in (
        (ActorPool(), 4, 1000, (4, 4)),
        (ActorPool(3), 4, 1000, (3, 3)),
        (ActorPool(3), 4, 1, (1, 1)),
        (ActorPool(least=1), 4, 1000, (1, 4)),
        (ActorPool(least=6), 4, 1000, (6, 6)),
        (ActorPool(5, least=2), 4, 1000, (2, 5)),
        (ActorPool(5, least=2), 4, 3, (2, 3)),
        (ActorPool(5, least=2), 4, 1, (1, 1)),
    ):
        assert pool.size(units, tasks) == size


def test_half_a_cpu_is_enough(tmp_path: Path) -> None:
    """A machine may have one CPU, or a training may hold all others."""

    @ray.remote(num_cpus=ray.cluster_resources()["CPU"] - 0.5)
    class Others:
        def there(self) -> None: ...

    others = Others.remote()
    ray.get(others.there.remote())
    (tmp_path / "killed").touch()
    results = list(ActorPool(gpu=False)(Squares(tmp_path / "killed"), cut(np.arange(8), 2)))
    assert np.concatenate([result["squares"] for result in results]).tolist() == [i * i for i in range(8)]
    ray.kill(others)
