"""A real Ray cluster of several nodes on this machine. Its processes can be killed as machines fail."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from pipeline.cluster.ray_internals import small_nodes
from tests.jobs.forked import descendants, forked_workers, template_address

PRELOAD = "pipeline.training.worker"
# Small object stores, since many nodes share one machine.
STORE_BYTES = 200 * 1024 * 1024
# A loopback address that Ray doesn't replace by the machine's outside address, as it does with 127.0.0.1.
LOOPBACK = "127.0.0.2"


@dataclass
class LocalCluster:
    """A head, and worker nodes.

    Attributes:
        cluster: Ray's own test cluster.
        nodes: living worker nodes, in the order in which they joined.
    """

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        """The address for RAY_ADDRESS."""
        return str(self.cluster.address)

    def join(self) -> None:
        """Let this process join. Its workers are forked, as those of a job, because it has a runtime environment."""
        ray.init(address=self.address, log_to_driver=False, runtime_env={"env_vars": {"RAY_DDPM_TESTS": "1"}})

    def add_node(self, cpus: float = 2) -> Any:
        """Start a node, let it join, and return it."""
        with forked_workers(PRELOAD, template_address()), small_nodes():
            node = self.cluster.add_node(
                num_cpus=cpus, object_store_memory=STORE_BYTES, node_ip_address=LOOPBACK
            )
        self.nodes.append(node)
        return node

    def resize(self, count: int) -> None:
        """Add nodes of one CPU, or kill the newest, until there are `count`."""
        while len(self.nodes) > count:
            self.kill_node(self.nodes[-1])
        while len(self.nodes) < count:
            self.add_node(1)

    def kill_node(self, node: Any) -> None:
        """Send SIGKILL to every process of a node, as if its machine lost power."""
        processes = self._processes(node)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)  # a killed process ends soon, not at once
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def worker_pids(self, title: str) -> list[int]:
        """Return ids of worker processes whose title contains `title`, such as "RayTrainWorker" or an actor's class."""
        found = []
        for node in [self.cluster.head_node, *self.nodes]:
            for process in self._processes(node):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if title in " ".join(process.cmdline()):
                        found.append(process.pid)
        return sorted(set(found))

    def kill_workers(self, title: str, count: int | None = None) -> list[int]:
        """Send SIGKILL to the first `count` of `worker_pids`, or to all for None, and return their ids."""
        pids = self.worker_pids(title)[:count]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    def _processes(self, node: Any) -> list[psutil.Process]:
        """Return the raylet and other services of a node, then their workers."""
        services, workers = list[psutil.Process](), list[psutil.Process]()
        for info in [info for infos in node.all_processes.values() for info in infos]:
            with contextlib.suppress(psutil.NoSuchProcess):
                services.append(psutil.Process(info.process.pid))
                workers += descendants(services[-1])
        return services + workers


def is_alive(pid: int) -> bool:
    """Return whether a process still runs. A zombie doesn't."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


@contextlib.contextmanager
def local_cluster(*cpus: float, head_cpus: float = 0, preload: str = PRELOAD) -> Iterator[LocalCluster]:
    """Yield a cluster with one node for each of `cpus` beside its head. All its processes are ended afterwards.

    Args:
        head_cpus: CPUs of the head.
        preload: modules that the head's workers need, separated by commas.
    """
    head = {
        "num_cpus": head_cpus, "object_store_memory": STORE_BYTES, "include_dashboard": False,
        "node_ip_address": LOOPBACK,
    }  # fmt: skip
    with forked_workers(preload, template_address()), small_nodes():
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
