"""Every private module of Ray that the project uses: an upgrade of Ray has this one place to look, and one test.

    from pipeline.cluster.ray_internals import ExecutionCallback

A name is looked up when it is asked for: all of them together would take seconds, and Ray reads the environment
when it is imported, which `session.connect` sets first.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

import psutil

INTERNALS = {
    # Bytes that the object stores of all nodes have spilled to disk: a curve beside every run.
    "get_memory_info_reply": "ray._private.internal_api",
    "get_state_from_address": "ray._private.internal_api",
    # The token that `ray start` keeps in the home folder, for this machine's own cluster.
    "maybe_enable_token_auth_if_token_available": "ray._private.authentication.authentication_token_setup",
    # What a cluster's head answers before this process joins it: whether it is one, its versions, its nodes here.
    "canonicalize_bootstrap_address_or_die": "ray._private.services",
    "find_node_ids": "ray._private.services",
    "init_grpc_channel": "ray._private.grpc_utils",
    "NodeInfoGcsServiceStub": "ray.core.generated.gcs_service_pb2_grpc",
    "InternalKVGcsServiceStub": "ray.core.generated.gcs_service_pb2_grpc",
    "CheckAliveRequest": "ray.core.generated.gcs_service_pb2",
    "InternalKVGetRequest": "ray.core.generated.gcs_service_pb2",
    "GetAllNodeInfoRequest": "ray.core.generated.gcs_service_pb2",
    "GcsNodeInfo": "ray.core.generated.gcs_pb2",
    # Whether an autoscaler adds nodes, what it says of what it is asked for, and the actor that asks it, for the sum of
    # what Ray Data, Ray Train and we need.
    "is_autoscaler_v2": "ray.autoscaler.v2.utils",
    "internal_kv_get_gcs_client": "ray.experimental.internal_kv",
    "DEBUG_AUTOSCALING_STATUS": "ray._private.ray_constants",
    "GetClusterStatusReply": "ray.core.generated.autoscaler_pb2",
    "get_or_create_autoscaling_coordinator": "ray.data._internal.cluster_autoscaler",
    # What the nodes have and have free, what an autoscaler may add, and the actors of a job.
    "state": "ray._private.state",
    # This process in Ray, with the node that it started or joined.
    "global_worker": "ray._private.worker",
    # The pace of Ray Data's loop, and a bound on what its tasks hold.
    "ExecutionCallback": "ray.data._internal.execution.execution_callback",
    "BackpressurePolicy": "ray.data._internal.execution.backpressure_policy.backpressure_policy",
    "ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY": "ray.data._internal.execution.backpressure_policy",
    # Ray Train's controller says when it is about to end a healthy worker group, which then saves.
    "ControllerCallback": "ray.train.v2._internal.execution.callback",
    "RunningState": "ray.train.v2._internal.execution.controller.state",
    "ResizingState": "ray.train.v2._internal.execution.controller.state",
    "PreemptingState": "ray.train.v2._internal.execution.controller.state",
    # Whether Ray Train took a worker's report: it drops some, and then never writes their checkpoints.
    "get_train_context": "ray.train.v2._internal.execution.context",
    # Variables that Ray Tune copies from the driver into every trial's settings, which anyone may read.
    "ENV_VARS_TO_PROPAGATE": "ray.tune.execution.class_cache",
}
# Loggers of Ray's job client, which repeat in several lines what is said in one.
JOB_CLIENT_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.authentication"
)  # fmt: skip


@contextlib.contextmanager
def no_random_ids() -> Iterator[None]:
    """Keeps modules that are imported inside from using the generator of random ids in Ray's core.

    The generator seeds itself at its first use. If that came before a fork, all forked processes would give the same ids.
    At import only the classes of actors use it; inside, their ids come from the system.
    """
    actor = importlib.import_module("ray.actor")
    real = actor.ActorClassID

    class FromSystem:
        @staticmethod
        def from_random() -> Any:
            return real(os.urandom(real.size()))

    actor.ActorClassID = FromSystem  # type: ignore[attr-defined]
    try:
        yield
    finally:
        actor.ActorClassID = real  # type: ignore[attr-defined]


def ask_job_server(client: Any, path: str) -> Any:
    """What a job server answers to a GET: its client's public methods ask neither for versions nor for a log's bytes."""
    answer = client._do_request("GET", path, timeout=60)
    answer.raise_for_status()
    return answer


def placement_groups() -> dict[str, Any]:
    """Placement groups that still reserve something, by their ids: as GCS keeps them, with who created each."""
    messages = importlib.import_module("ray.core.generated.gcs_pb2").PlacementGroupTableData
    state = importlib.import_module("ray._private.state").state
    found = map(messages.FromString, state._connect_and_get_accessor().get_placement_group_table())
    return {group.placement_group_id.hex(): group for group in found if group.state != messages.REMOVED}


def silence_published_errors() -> None:
    """Ray's driver prints every error that a node publishes, with its traceback and whatever its loggers' level.

    Each also reaches its caller as an exception. With `log_to_driver=False` nothing else is printed by this function.
    """
    worker = importlib.import_module("ray._private.worker")
    worker.print_to_stdstream = lambda data, ignore_prefix=False: None  # type: ignore[attr-defined]


@contextlib.contextmanager
def small_nodes() -> Iterator[None]:
    """Nodes that are started inside have no monitor of an autoscaler, no log monitor and no dashboard's server.

    A Ray of one job on one machine has no use for them, and `ray.init` has no option for it. They take some three
    seconds of CPU time, just when all else starts.
    """
    node = importlib.import_module("ray._private.node").Node
    real = {name: getattr(node, name) for name in ("start_monitor", "start_log_monitor", "start_api_server")}
    for name in real:
        setattr(node, name, lambda self, **_: setattr(self, "_webui_url", ""))
    try:
        yield
    finally:
        for name, method in real.items():
            setattr(node, name, method)


def kill_without_asking() -> None:
    """The end of the Ray that this process started: SIGKILL at once, since its processes do not hear SIGTERM.

    Ray would wait a second for each of them. A raylet that is killed leaves its workers and agents to find out.
    """
    node = importlib.import_module("ray._private.worker")._global_node
    kill = node.kill_all_processes

    def at_once(check_alive: bool = True, allow_graceful: bool = False, wait: bool = False) -> None:
        below = []
        for _, process in node.live_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                below += psutil.Process(process.pid).children(recursive=True)
        kill(check_alive=check_alive, allow_graceful=False, wait=wait)
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    node.kill_all_processes = at_once


def __getattr__(name: str) -> Any:
    if name not in INTERNALS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(INTERNALS[name]), name)
