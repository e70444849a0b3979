"""Actors of Ray Data that all jobs of a cluster share die with the node of their first user, and the jobs go on."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster import autoscaler
from pipeline.cluster.pool import ActorPool
from tests.cluster.test_ray_internals import requested
from tests.data.common import leave_ray, sent_by_value
from tests.system.cluster import LocalCluster
from tests.system.served import wait_for

pytestmark = pytest.mark.system


@dataclass(frozen=True)
class Slow:
    def start(self, device: str) -> Callable[[int], int]:
        def same(number: int) -> int:
            time.sleep(0.5)
            return number

        return same


@pytest.fixture
def joined(machines: LocalCluster) -> Iterator[LocalCluster]:
    """The cluster with two nodes of one CPU, which this process has joined."""
    machines.resize(2)
    leave_ray()
    machines.join()
    with sent_by_value(__name__):
        yield machines
    leave_ray()


def use_shared_actors() -> str:
    """Make Ray Data's shared actors on the node of this process if there are none. Return that node's id."""
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
    from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker

    ray.get(get_or_create_actor_location_tracker().get_actor_locations.remote([]))
    ray.get(get_or_create_autoscaling_coordinator().__ray_ready__.remote())
    return str(ray.get_runtime_context().get_node_id())


def pin_shared_actors(node: Any) -> None:
    """Make a node the first user of Ray Data's shared actors."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"] in ("ActorLocationTracker", "AutoscalingCoordinator"):
            ray.kill(ray.get_actor(**actor))
    here = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    use = ray.remote(num_cpus=0)(use_shared_actors).options(scheduling_strategy=here)
    assert ray.get(use.remote()) == node.node_id


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_pool_does_all_its_tasks(joined: LocalCluster, moment: str) -> None:
    node = joined.nodes[0]
    pin_shared_actors(node)
    if moment == "before":
        joined.kill_node(node)
    done = list[int]()
    for number in ActorPool(2, gpu=False)(Slow(), range(12)):
        done.append(number)
        if moment == "during" and len(done) == 3:
            joined.kill_node(node)
    assert done == list(range(12))


def another_job_asks() -> bool:
    """Request 32 CPUs. Return False if the coordinator is still the one that died with its node."""
    try:
        coordinator = autoscaler.get_or_create_autoscaling_coordinator()
        ray.get(
            coordinator.request_resources.remote(
                requester_id="other", resources=[{"CPU": 32.0}], expire_after_s=60.0
            )
        )
    except ray.exceptions.RayError:
        return False
    return True


def test_a_job_that_waits_for_nodes_asks_again(joined: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request would be lost with the actor, and the job would wait for ever."""
    monkeypatch.setattr(autoscaler, "REPEAT_SECONDS", 0.0)
    monkeypatch.setattr(autoscaler, "POLL_SECONDS", 0.2)
    node = joined.nodes[0]
    pin_shared_actors(node)

    with contextlib.closing(autoscaler._answers([{"CPU": 64.0}])) as answers:
        wait_for("the request", lambda: bool(next(answers)) and {"CPU": 64.0} in requested())
        joined.kill_node(node)
        wait_for(
            "the node's death",
            lambda: not next(n["Alive"] for n in ray.nodes() if n["NodeID"] == node.node_id),
        )
        # The sum of requests is replaced at the next one, which another job makes here.
        wait_for("another job's request", another_job_asks)
        both = [{"CPU": 32.0}, {"CPU": 64.0}]
        wait_for("both requests", lambda: bool(next(answers)) and all(one in requested() for one in both), 60)
