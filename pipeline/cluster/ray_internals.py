"""Every private module of Ray that the project uses, so an upgrade of Ray has one place to check, and one test.

    from pipeline.cluster.ray_internals import ExecutionCallback

A name is imported only on access. All imports together would take seconds, and Ray reads the environment when it is
imported, after `session.connect` has set it.
"""

import contextlib
import importlib
import importlib.util
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import psutil

INTERNALS = {
    # Bytes that the object stores of all nodes have spilled to disk, a curve of every run.
    "get_memory_info_reply": "ray._private.internal_api",
    "get_state_from_address": "ray._private.internal_api",
    # The token that `ray start` keeps in the home folder, for this machine's own cluster.
    "maybe_enable_token_auth_if_token_available": "ray._private.authentication.authentication_token_setup",
    # Questions to a cluster's head before this process joins it: its versions, and its nodes on this machine.
    "canonicalize_bootstrap_address_or_die": "ray._private.services",
    "find_node_ids": "ray._private.services",
    "init_grpc_channel": "ray._private.grpc_utils",
    "NodeInfoGcsServiceStub": "ray.core.generated.gcs_service_pb2_grpc",
    "InternalKVGcsServiceStub": "ray.core.generated.gcs_service_pb2_grpc",
    "CheckAliveRequest": "ray.core.generated.gcs_service_pb2",
    "InternalKVGetRequest": "ray.core.generated.gcs_service_pb2",
    "GetAllNodeInfoRequest": "ray.core.generated.gcs_service_pb2",
    "GcsNodeInfo": "ray.core.generated.gcs_pb2",
    # The autoscaler, its answers, and the actor that sends it the sum of the requests of Ray Data, Ray Train and this
    # project.
    "is_autoscaler_v2": "ray.autoscaler.v2.utils",
    "internal_kv_get_gcs_client": "ray.experimental.internal_kv",
    "DEBUG_AUTOSCALING_STATUS": "ray._private.ray_constants",
    "GetClusterStatusReply": "ray.core.generated.autoscaler_pb2",
    "get_or_create_autoscaling_coordinator": "ray.data._internal.cluster_autoscaler",
    # The nodes' resources and free resources, the autoscaler's limits, and the actors of a job.
    "state": "ray._private.state",
    # This process's worker object in Ray, with the node that it started or joined.
    "global_worker": "ray._private.worker",
    # The pace of Ray Data's loop, and a limit on the memory of its tasks.
    "ExecutionCallback": "ray.data._internal.execution.execution_callback",
    "BackpressurePolicy": "ray.data._internal.execution.backpressure_policy.backpressure_policy",
    "ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY": "ray.data._internal.execution.backpressure_policy",
    # A callback before Ray Train stops a healthy worker group, which then saves.
    "ControllerCallback": "ray.train.v2._internal.execution.callback",
    "RunningState": "ray.train.v2._internal.execution.controller.state",
    "ResizingState": "ray.train.v2._internal.execution.controller.state",
    "PreemptingState": "ray.train.v2._internal.execution.controller.state",
    # Shows if Ray Train accepted a worker's report. It drops some reports and never writes their checkpoints.
    "get_train_context": "ray.train.v2._internal.execution.context",
    # Variables that Ray Tune copies from the driver into every trial's settings, which any user of the cluster can read.
    "ENV_VARS_TO_PROPAGATE": "ray.tune.execution.class_cache",
}
# What Ray's workers import after their start, for their first answer or when they run Ray Train or Ray Data. A fork
# server imports it once, which saves each worker a tenth to three tenths of a second of a core.
WORKER_IMPORTS = (
    "ray.tune",
    "pydantic.v1.fields",
    "starlette.datastructures",
    "ray.dag.compiled_dag_node",
    "ray._private.arrow_serialization",
    "ray.data._internal.planner.planner",
    "ray.data._internal.logical.optimizers",
    "ray.data._internal.issue_detection.issue_detector_configuration",
    "ray.autoscaler.sdk",
    "ray.autoscaler.v2.utils",
)
# What Ray's dashboard and a node's agent need beside Ray (ray/dashboard/optional_deps.py).
DASHBOARD_LIBRARIES = (
    "aiohttp", "aiohttp_cors", "grpc", "opencensus", "opentelemetry.exporter.prometheus", "opentelemetry.proto",
    "prometheus_client", "pydantic",
)  # fmt: skip
# Ports of a node's two agents, in Ray's parameters of a node.
AGENT_PORTS = (
    "metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port"
)  # fmt: skip
# Loggers of Ray's job client. They repeat in several lines an error that we report in one.
JOB_CLIENT_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.authentication"
)  # fmt: skip


@contextlib.contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Gives attributes of one of Ray's modules or classes other values inside this context."""
    real = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in real.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def no_random_ids() -> Iterator[None]:
    """Keeps modules that are imported inside this context from using the random ids of Ray's core.

    Their generator seeds itself at its first use. After a use before the fork, all forked processes would draw the same
    ids. During imports only classes of actors use it. In this context their ids come from the operating system.
    """
    actor = importlib.import_module("ray.actor")
    real = actor.ActorClassID

    class FromSystem:
        @staticmethod
        def from_random() -> Any:
            return real(os.urandom(real.size()))

    with _replaced(actor, ActorClassID=FromSystem):
        yield


def set_longest_wait(seconds: float) -> None:
    """Limits how long one step of Ray Data's loop in this process waits for output of tasks.

    Ray waits up to 0.1 s unless all running tasks have output. Then few blocks pass in a second, however fast they are
    made.
    """
    state = importlib.import_module("ray.data._internal.execution.streaming_executor_state")
    state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = seconds  # type: ignore[attr-defined]


def ask_job_server(client: Any, path: str) -> Any:
    """A job server's answer to a GET request. The public methods of its client return neither versions nor a log's bytes.

    Args:
        path: path of the URL.

    Raises:
        requests.HTTPError: the answer is an error.
    """
    answer = client._do_request("GET", path, timeout=60)
    answer.raise_for_status()
    return answer


def placement_groups() -> dict[str, Any]:
    """Placement groups that are not removed, by id in hex, as GCS's messages, which also name the creator."""
    messages = importlib.import_module("ray.core.generated.gcs_pb2").PlacementGroupTableData
    state = importlib.import_module("ray._private.state").state
    found = map(messages.FromString, state._connect_and_get_accessor().get_placement_group_table())
    return {group.placement_group_id.hex(): group for group in found if group.state != messages.REMOVED}


@contextlib.contextmanager
def no_cleaner_without_dashboard() -> Iterator[None]:
    """Trainings that start inside this context have no `PlacementGroupCleaner` if Ray has no dashboard.

    Ray Train's cleaner asks the dashboard whether the controller lives. Without a dashboard it looks for its address for
    40 s, and a training that ends meanwhile waits up to 12 s for it.
    """
    constants = importlib.import_module("ray._private.ray_constants")
    trainer = importlib.import_module("ray.train.v2.api.data_parallel_trainer")
    gcs = __getattr__("internal_kv_get_gcs_client")()
    if gcs.internal_kv_get(constants.DASHBOARD_ADDRESS.encode(), constants.KV_NAMESPACE_DASHBOARD):
        yield
        return
    with _replaced(trainer, PlacementGroupCleanerCallback=__getattr__("ControllerCallback")):
        yield


def silence_published_errors() -> None:
    """Keeps Ray's driver from printing every error that a node publishes, with a traceback and at any log level.

    Each error also reaches its caller as an exception. The replaced function prints nothing else under
    `log_to_driver=False`.
    """
    worker = importlib.import_module("ray._private.worker")
    worker.print_to_stdstream = lambda data, ignore_prefix=False: None  # type: ignore[attr-defined]


@contextlib.contextmanager
def small_nodes() -> Iterator[None]:
    """Nodes that start inside this context have no autoscaler monitor, no log monitor and no dashboard server.

    A Ray for one job on one machine does not need them, and `ray.init` has no option to leave them out. They would take
    about three seconds of CPU time during the start. Before the start Ray imports the dashboard's libraries, to see
    whether they are installed; here it only looks for them, which saves 0.4 s.
    """
    node = importlib.import_module("ray._private.node").Node
    utils = importlib.import_module("ray._private.utils")
    import_them = utils.get_dashboard_dependency_error

    def start_nothing(self: Any, **_: Any) -> None:
        self._webui_url = ""

    def look_for_them() -> ImportError | None:
        with contextlib.suppress(ModuleNotFoundError):  # a module whose package is missing
            if all(map(importlib.util.find_spec, DASHBOARD_LIBRARIES)):
                return None
        missing: ImportError | None = import_them()
        return missing

    names = ("start_monitor", "start_log_monitor", "start_api_server")
    with (
        _replaced(node, **dict.fromkeys(names, start_nothing)),
        _replaced(utils, get_dashboard_dependency_error=look_for_them),
    ):
        yield


@contextlib.contextmanager
def patient_start(seconds: float) -> Iterator[None]:
    """Inside this context `ray.init` waits up to `seconds` for the node that it starts.

    Ray itself waits for half a minute and has no setting. A machine on which several jobs start at once may need more.
    The raylet also ends if its two agents have not told it their ports within 15 seconds. So both get their ports here,
    and the raylet waits for neither agent.
    """
    services: Any = importlib.import_module("ray._private.services")
    node = importlib.import_module("ray._private.node").Node
    get_node, start, start_process = services.get_node, node.__init__, services.start_ray_process

    def get_node_patiently(*where: Any) -> Any:
        end = time.monotonic() + seconds
        while True:
            try:
                return get_node(*where)
            except RuntimeError:  # the node has not registered yet
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    ports = dict(zip(AGENT_PORTS, _free_ports(), strict=False))

    def start_with_ports(self: Any, ray_params: Any, *rest: Any, **named: Any) -> None:
        vars(ray_params).update(ports)
        start(self, ray_params, *rest, **named)

    def start_process_with_port(command: list[str], process_type: str, *rest: Any, **named: Any) -> Any:
        if process_type == "raylet":  # Ray itself gives the raylet all but this port
            command = [*command, f"--dashboard_agent_listen_port={ports['dashboard_agent_listen_port']}"]
        return start_process(command, process_type, *rest, **named)

    with (
        _replaced(services, get_node=get_node_patiently, start_ray_process=start_process_with_port),
        _replaced(node, __init__=start_with_ports),
    ):
        yield


def _free_ports() -> Iterator[int]:
    """Ports that nobody uses. The system does not assign any of them, and Ray's workers use those below.

    Jobs that start at once look at different ones first.
    """
    ports, first = range(20_000, 32_000), len(AGENT_PORTS) * os.getpid()
    for number in range(first, first + len(ports)):
        port = ports[number % len(ports)]
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("", port))
            yield port


def kill_without_asking() -> None:
    """Makes the Ray that this process started end by SIGKILL at once, because its processes block SIGTERM.

    Ray would wait a second for each process. Its workers and agents are killed as well, because they would notice only
    later that their raylet is gone.
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


def pass_over_deleted_checkpoints() -> None:
    """Lets Ray Train's controller, in its own process, go on if it deletes a checkpoint that is gone already.

    It would end the run, for example because a user made room, or by an object store's rule on old files.
    """
    manager: Any = importlib.import_module("ray.train.v2._internal.execution.checkpoint.checkpoint_manager")
    delete = manager.delete_fs_path

    def delete_if_there(**place: Any) -> None:
        with contextlib.suppress(FileNotFoundError):
            delete(**place)

    manager.delete_fs_path = delete_if_there


def wait_for_places(forget: float, pause: float) -> None:
    """Lets Ray Train's elastic controller, in its own process, pause while it waits for places.

    Ray's controller looks for places without a pause, which takes a core. Ray also keeps the places of a dead controller
    for three minutes, so a resume finds none.

    Args:
        forget: seconds after which others get the places of a controller that died.
        pause: seconds between two looks.
    """
    policies = "ray.train.v2._internal.execution.scaling_policy"
    client: Any = importlib.import_module(f"{policies}.autoscaling_coordinator_client")
    client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = forget
    elastic: Any = importlib.import_module(f"{policies}.elastic")
    policy = elastic.ElasticScalingPolicy
    decide = policy.make_decision_for_non_running_worker_group

    def decide_and_pause(self: Any) -> Any:
        decision = decide(self)
        if isinstance(decision, elastic.NoopDecision):
            time.sleep(pause)
        return decision

    policy.make_decision_for_non_running_worker_group = decide_and_pause


def __getattr__(name: str) -> Any:
    if name not in INTERNALS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(INTERNALS[name]), name)
