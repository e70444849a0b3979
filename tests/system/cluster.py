"""A real Ray cluster of several nodes on this machine, whose processes can be killed as machines fail."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from pipeline.cluster.forking import forked_workers

PRELOAD = "pipeline.training.worker"
# Small stores: many nodes share one machine.
STORE_BYTES = 200 * 1024 * 1024
# In the loopback range, but not one that Ray takes for "this machine" and replaces by its outside address.
LOOPBACK = "127.0.0.2"


@dataclass
class LocalCluster:
    """A head without CPUs, and nodes that do the work.

    Attributes:
        nodes: those that are alive, in the order in which they joined.
    """

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return str(self.cluster.address)

    def add_node(self, cpus: float = 2) -> Any:
        """A node joins."""
        with forked_workers(PRELOAD):
            node = self.cluster.add_node(
                num_cpus=cpus, object_store_memory=STORE_BYTES, node_ip_address=LOOPBACK
            )
        self.nodes.append(node)
        return node

    def resize(self, count: int) -> None:
        """Adds nodes of one CPU, or kills some, until there are so many."""
        while len(self.nodes) > count:
            self.kill_node(self.nodes[-1])
        while len(self.nodes) < count:
            self.add_node(1)

    def kill_node(self, node: Any) -> None:
        """SIGKILL to everything that runs on a node, as when its machine loses power."""
        processes = self._processes(node)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)  # one that is killed ends soon, not at once
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def worker_pids(self, title: str) -> list[int]:
        """Worker processes whose title contains `title`, such as "RayTrainWorker" or an actor's class."""
        found = []
        for node in [self.cluster.head_node, *self.nodes]:
            for process in self._processes(node):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if title in " ".join(process.cmdline()):
                        found.append(process.pid)
        return sorted(set(found))

    def kill_workers(self, title: str, count: int | None = None) -> list[int]:
        """SIGKILL to the first `count` of `worker_pids` (all of them where it is None); returns their ids."""
        pids = self.worker_pids(title)[:count]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    def _processes(self, node: Any) -> list[psutil.Process]:
        """The raylet and the other services of a node, then their workers."""
        services, workers = list[psutil.Process](), list[psutil.Process]()
        for info in [info for infos in node.all_processes.values() for info in infos]:
            with contextlib.suppress(psutil.NoSuchProcess):
                services.append(psutil.Process(info.process.pid))
                workers += services[-1].children(recursive=True)
        return services + workers


def is_alive(pid: int) -> bool:
    """Whether a process still runs; one that is dead and not yet reaped does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


@contextlib.contextmanager
def local_cluster(*cpus: float) -> Iterator[LocalCluster]:
    """A cluster with one node for each of `cpus`; every process of it is gone at the end."""
    head = {
        "num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False, "node_ip_address": LOOPBACK
    }  # fmt: skip
    with forked_workers(PRELOAD):
        cluster = Cluster(initialize_head=True, head_node_args=head)
    local = LocalCluster(cluster)
    try:
        for count in cpus:
            local.add_node(count)
        yield local
    finally:
        left = [p for node in [cluster.head_node, *local.nodes] for p in local._processes(node)]
        cluster.shutdown()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
