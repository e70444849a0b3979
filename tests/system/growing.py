"""A cluster of only a head, whose autoscaler adds nodes with declared, not real, GPUs. All of it is on loopback."""

import contextlib
import importlib.abc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply, NodeStatus

from tests.jobs.common import OF_TRAINING, ROOT, database
from tests.jobs.forked import ForkedJob, starting_node, template_address
from tests.system.served import LOOPBACK, family, free_ports, kill, user_environment, wait_for

HEAD, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"  # as Ray's fake node provider names it
MOST_NODES = 4
IDLE_SECONDS = 15
STORE_BYTES = 100 * 2**20
NO_COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
)  # fmt: skip
PLACES = "RAY_DDPM_TEST_PLACES"
TEMPLATE = "RAY_DDPM_TEST_TEMPLATE"


@dataclass(frozen=True)
class Growing:
    """The head, its environment and its folder.

    Attributes:
        environment: the environment of a driver that joins the cluster.
        places: folder with a file for each process that was given a GPU, which says where it ran.
        head: the head's process.
        jobs: all jobs that `start` has started.
    """

    environment: dict[str, str]
    places: Path
    head: subprocess.Popen[bytes]
    jobs: list[ForkedJob]

    def status(self) -> Any:
        """Return the head's view of the cluster, Ray's GetClusterStatusReply."""
        client = GcsClient(address=self.environment["RAY_ADDRESS"])
        return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=30))

    def gpu_nodes(self) -> set[str]:
        """Return the ids of living nodes with GPUs."""
        up = (
            one for one in self.status().cluster_resource_state.node_states if one.status != NodeStatus.DEAD
        )
        return {one.node_id.hex() for one in up if one.total_resources.get("GPU")}

    def requested(self) -> list[Any]:
        """Return all requests to the autoscaler."""
        constraints = self.status().cluster_resource_state.cluster_resource_constraints
        return [entry for one in constraints for entry in one.resource_requests]

    def start(self, home: Path, job: str, *flags: object) -> ForkedJob:
        """Start a job that joins the cluster, in a process of its own."""
        home.mkdir(exist_ok=True)
        variables = self.environment | {"MLFLOW_TRACKING_URI": database(home)}
        files = {"stdout": home / "stdout", "stderr": home / "stderr"}
        self.jobs.append(ForkedJob(job, *flags, cwd=home, variables=variables, **files))
        return self.jobs[-1]

    def placed(self) -> list[dict[str, Any]]:
        """Return job, node and GPUs of every process that was given GPUs since the last call."""
        files = list(self.places.glob("*.json"))
        found = [json.loads(file.read_text()) for file in files]
        for file in files:
            file.unlink()
        return found


def fall_back_to_cpu() -> None:
    """Make a worker process compute on the CPU instead of a GPU that it was given but that doesn't exist.

    A process with a GPU also writes a file to `places`. A module that isn't imported yet is changed on import.
    """
    hook = _AfterImport()
    sys.meta_path.insert(0, hook)
    hook.change_imported()


class _AfterImport(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._changes: dict[str, Callable[[Any], None]] = {
            "ray.train.torch.config": _join_by_gloo,
            "ray.air._internal.device_manager.nvidia_gpu": _train_on_cpu,
            "pipeline.generation.sampler": _sample_on_cpu,
        }

    def change_imported(self) -> None:
        """Change the modules that a forked worker has from its server."""
        for name in self._changes.keys() & sys.modules.keys():
            self._changes.pop(name)(sys.modules[name])

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in self._changes:
            return None
        change = self._changes.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec and spec.loader
        load = spec.loader.exec_module

        def load_and_change(module: Any) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


def _note(job: str) -> None:
    import ray

    context = ray.get_runtime_context()
    place = {"job": job, "node": context.get_node_id(), "gpus": context.get_accelerator_ids()["GPU"]}
    Path(os.environ[PLACES], f"{os.getpid()}-{job}.json").write_text(json.dumps(place))


def _join_by_gloo(module: Any) -> None:
    join = module._setup_torch_process_group
    module._setup_torch_process_group = lambda backend, **options: join(backend="gloo", **options)


def _train_on_cpu(module: Any) -> None:
    import torch

    def devices(self: Any) -> list[torch.device]:
        _note("train")
        return [torch.device("cpu")]

    module.CUDATorchDeviceManager.get_devices = devices
    module.CUDATorchDeviceManager.set_device = lambda self, device: None


def _sample_on_cpu(module: Any) -> None:
    begin = module.Renderer.__init__

    def begin_on_cpu(self: Any, setup: Any, device: str = "cpu") -> None:
        if device == "cuda":
            _note("generate")
        begin(self, setup, "cpu")

    module.Renderer.__init__ = begin_on_cpu


@contextlib.contextmanager
def growing_cluster() -> Iterator[Growing]:
    """Start the head. All processes that it or its autoscaler started are ended afterwards."""
    home = Path(tempfile.mkdtemp(prefix="rg-", dir="/tmp"))  # short, since the paths of sockets begin with it
    places = home / "places"
    places.mkdir()
    gcs, client, agent, metrics, autoscaler = free_ports(5)
    gpu = {"CPU": 1, "GPU": 1, "object_store_memory": STORE_BYTES}
    config = {name: [] for name in NO_COMMANDS} | {
        "cluster_name": "growing",
        "max_workers": MOST_NODES,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": gpu, "node_config": {}, "min_workers": 0, "max_workers": MOST_NODES},
        },
        # The provider is given by class, since Ray's wheel lacks the file of defaults for its name.
        "provider": {
            "type": "external",
            "module": "tests.system.growing_nodes.ForkingProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": f"{LOOPBACK}:{gcs}",
            "launch_multiple": True,
            "head_node_id": HEAD,
        },
    }
    (home / "autoscaling.json").write_text(json.dumps(config))
    base = user_environment() | {
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        # This makes Ray use 127.0.0.1 for this machine. Nodes that the autoscaler starts have no flag for it.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        PLACES: str(places),
    }
    head = base | {
        "PYTHONPATH": str(ROOT),  # for ForkingProvider
        TEMPLATE: template_address(),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(autoscaler),
        "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "1",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        **OF_TRAINING,
    }
    words = [
        *starting_node(template_address(), "start"), "--head", "--block", "--disable-usage-stats",
        f"--node-ip-address={LOOPBACK}", f"--port={gcs}", "--num-cpus=0", "--num-gpus=0", "--include-dashboard=false",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}", "--min-worker-port=0", "--max-worker-port=0",
        f"--object-store-memory={STORE_BYTES}", f"--temp-dir={home}/ray",
        f"--autoscaling-config={home}/autoscaling.json",
    ]  # fmt: skip
    with (home / "head.log").open("wb") as log:
        process = subprocess.Popen(words, cwd=home, env=head, stdout=log, stderr=subprocess.STDOUT)
    jobs = list[ForkedJob]()
    try:
        wait_for("Ray's head", lambda: b"--block" in (home / "head.log").read_bytes(), needed=[process])
        # The jobs' worker processes get the hook the way a submitted job's processes get their runtime environment.
        hook = {"worker_process_setup_hook": "tests.system.growing.fall_back_to_cpu"}
        settings = json.dumps({"runtime_env": hook})
        driver = {"RAY_ADDRESS": f"{LOOPBACK}:{gcs}", "RAY_JOB_CONFIG_JSON_ENV_VAR": settings}
        yield Growing(base | driver, places, process, jobs)
    except BaseException:
        print((home / "head.log").read_text()[-2000:])
        raise
    finally:
        for job in jobs:
            job.kill()
        below = family(process)
        kill(process)
        for one in below:  # nodes are children of its autoscaler and outlive it
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(below, timeout=10)
        shutil.rmtree(home, ignore_errors=True)
