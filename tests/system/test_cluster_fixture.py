"""Nodes of the tests' cluster join it, die with all their processes, and leave nothing behind."""

import pytest
import ray

from tests.data.common import leave_ray
from tests.system.cluster import LocalCluster, is_alive


@pytest.mark.system
def test_a_killed_node_is_gone_and_its_work_is_done_elsewhere(machines: LocalCluster) -> None:
    machines.resize(2)
    leave_ray()
    machines.join()
    try:

        @ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)
        class Victim:
            def node(self) -> str:
                return str(ray.get_runtime_context().get_node_id())

        victim = Victim.remote()
        before = ray.get(victim.node.remote())
        (pid,) = machines.worker_pids("Victim")
        machines.kill_node(next(n for n in machines.nodes if n.node_id == before))
        assert not is_alive(pid)
        assert ray.get(victim.node.remote(), timeout=60) != before
    finally:
        ray.shutdown()
