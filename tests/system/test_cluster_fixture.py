"""The cluster that the system tests break is a real one: nodes join, die whole, and leave nothing behind."""

import pytest
import ray

from tests.system.cluster import is_alive, local_cluster


@pytest.mark.system
def test_a_killed_node_is_gone_and_its_work_is_done_elsewhere() -> None:
    with local_cluster(1, 1) as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        try:

            @ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)
            class Victim:
                def node(self) -> str:
                    return str(ray.get_runtime_context().get_node_id())

            victim = Victim.remote()
            before = ray.get(victim.node.remote())
            (pid,) = cluster.worker_pids("Victim")
            cluster.kill_node(next(n for n in cluster.nodes if n.node_id == before))
            assert not is_alive(pid)
            assert ray.get(victim.node.remote(), timeout=60) != before
            everything = [p.pid for n in cluster.nodes for p in cluster._processes(n)]
        finally:
            ray.shutdown()
    assert not any(is_alive(pid) for pid in everything)
