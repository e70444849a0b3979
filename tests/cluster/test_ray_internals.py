"""Each private name of Ray still does its work on the installed Ray. A failure means that an upgrade moved it."""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.data import DataContext
from ray.experimental.internal_kv import _internal_kv_get
from ray.train import ScalingConfig
from ray.train.v2.api import data_parallel_trainer

from pipeline.cluster import autoscaler, ray_internals
from pipeline.cluster.pace import STEP_SECONDS, InFlightLimit, PacedExecution, set_in_flight, set_pace
from pipeline.cluster.ray_internals import INTERNALS, JOB_CLIENT_LOGGERS
from pipeline.cluster.session import is_own_ray, spilled_bytes
from pipeline.training.signals import SaveBeforeShutdown
from pipeline.tuning.search import SECRETS

POLICIES, CLIENT = "ray.train.v2._internal.execution.scaling_policy", "autoscaling_coordinator_client"


@pytest.mark.parametrize("name", INTERNALS)
def test_it_is_where_it_is_looked_for(name: str) -> None:
    assert getattr(ray_internals, name) is not None


def test_a_name_that_is_not_listed_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'RayTaskError'"):
        _ = ray_internals.RayTaskError


def test_memory_info_counts_what_the_object_stores_spilled(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ray.get_runtime_context().gcs_address
    state = ray_internals.get_state_from_address(address)
    reply = ray_internals.get_memory_info_reply(state, timeout_seconds=5.0)
    assert reply.store_stats.object_store_bytes_avail > 0
    reply.store_stats.spilled_bytes_total = 7
    monkeypatch.setattr(ray_internals, "get_memory_info_reply", lambda *_, **__: reply, raising=False)
    assert spilled_bytes() == 7


def test_the_state_knows_nodes_actors_and_whose_ray_it_is(cluster: None) -> None:
    """tests/training/test_room.py shows how jobs use it when the cluster is full."""
    state = ray_internals.state
    (node,) = state.available_resources_per_node().values()
    assert node["memory"] > 0
    assert state.get_max_resources_from_cluster_config() is None  # no autoscaler

    @ray.remote(num_cpus=0)
    class Here:
        def pid(self) -> int:
            return os.getpid()

    here, job = Here.remote(), ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    pid = ray.get(here.pid.remote())
    alive = state.actor_table(None, job, "ALIVE").values()
    assert ("Here", pid) in [(entry["ActorClassName"].rpartition(".")[2], entry["Pid"]) for entry in alive]
    assert is_own_ray()
    assert not ray.get(ray.remote(num_cpus=0)(is_own_ray).remote())


def requested() -> list[dict[str, float]]:
    """Return the sum of all requests to the autoscaler.

    Version 1 of the autoscaler reads requests here. Every Ray has this channel, with or without an autoscaler.
    """
    found: list[dict[str, float]] = json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]")
    return found


def test_a_request_is_in_the_sum_of_all_and_a_cluster_without_an_autoscaler_is_known(cluster: None) -> None:
    """tests/system/test_growing.py shows what an autoscaler does with the request."""

    def asked() -> list[tuple[dict[str, float], int]]:
        found = requested()
        return [(one, found.count(one)) for one in found[:1]]

    assert autoscaler.growth() == "none"
    with contextlib.closing(autoscaler._answers([{"CPU": 3.0, "GPU": 1.0}] * 2)) as answers:
        assert next(answers) == "unheard"
        assert asked() == [({"CPU": 3.0, "GPU": 1.0}, 2)]
    assert asked() == []


def test_errors_that_a_node_publishes_stay_off_the_terminal(
    cluster: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import worker
    from ray._private.utils import publish_error_to_driver

    shown, silent = list[dict[str, object]](), worker.print_to_stdstream
    # Ray prints the errors of nodes through this function.
    monkeypatch.setattr(
        worker, "print_to_stdstream", lambda data, ignore_prefix=False: (shown.append(data), silent(data))
    )
    deadline = time.monotonic() + 60
    while not shown and time.monotonic() < deadline:
        publish_error_to_driver("test", "Traceback of a node", gcs_client=worker.global_worker.gcs_client)
        time.sleep(0.1)
    assert shown[0]["lines"] == ["Traceback of a node"]
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err


def test_the_token_of_this_machine_is_turned_on_without_a_warning() -> None:
    """job_server.connect calls it. tests/cluster/test_job_server.py tries it with a token."""
    parameters = inspect.signature(ray_internals.maybe_enable_token_auth_if_token_available).parameters
    assert "warn_if_disabled" in parameters


def test_the_job_clients_loggers_have_these_names() -> None:
    for name in JOB_CLIENT_LOGGERS[:2]:
        assert importlib.import_module(name).logger.name == name
    assert importlib.import_module(JOB_CLIENT_LOGGERS[2])


def test_ray_data_has_the_hooks_of_the_pace_and_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/cluster/test_pace.py shows that Ray Data calls them."""
    assert hasattr(ray_internals.ExecutionCallback, "on_execution_step")
    for name in ("can_add_input", "max_task_output_bytes_to_read"):
        assert hasattr(ray_internals.BackpressurePolicy, name)
        assert hasattr(InFlightLimit, name)
    module = importlib.import_module("ray.data._internal.execution.streaming_executor_state")
    assert hasattr(module.OpState, "total_enqueued_input_blocks")
    # Ray waits this long in a step, however soon a task has output.
    assert "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S" in module.process_completed_tasks.__code__.co_names
    monkeypatch.setattr(module, "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S", 0.1)
    context = DataContext()
    set_pace(context)
    set_pace(context)
    assert context.custom_execution_callback_classes.count(PacedExecution) == 1
    assert module.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S == STEP_SECONDS
    set_in_flight(context, 100, 10, 1)
    key = ray_internals.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY
    assert context.get_config(key) == [InFlightLimit]


def test_ray_trains_controller_has_the_hook_and_the_states() -> None:
    """tests/system/test_training_faults.py shows that the controller calls it."""
    hook = ray_internals.ControllerCallback.after_controller_state_update
    assert list(inspect.signature(hook).parameters) == ["self", "previous_state", "current_state"]
    start = ray_internals.ControllerCallback.after_controller_start
    assert list(inspect.signature(start).parameters) == ["self", "train_run_context"]
    assert issubclass(SaveBeforeShutdown, ray_internals.ControllerCallback)
    states = [getattr(ray_internals, name) for name in ("RunningState", "ResizingState", "PreemptingState")]
    assert len({state.__name__ for state in states}) == 3


def test_a_report_that_ray_train_drops_is_not_counted() -> None:
    """Ray Train counts every report, and takes the count back for one that it drops, before it writes anything."""
    context = importlib.import_module(INTERNALS["get_train_context"])
    report = inspect.getsource(context.TrainContext.report)
    dropped = report.index("self.report_call_index -= 1")
    assert report.index("self.report_call_index += 1") < dropped < report.index("return", dropped)
    assert report.index("return", dropped) < report.index("threadpool.submit")
    assert isinstance(context.TrainContext.report_call_index, int)


def test_ray_tune_copies_the_variables_in_this_set_into_trials() -> None:
    """By default the set names the driver's secrets. search.py takes them out."""
    module = importlib.import_module(INTERNALS["ENV_VARS_TO_PROPAGATE"])
    assert ray_internals.ENV_VARS_TO_PROPAGATE is module.ENV_VARS_TO_PROPAGATE
    assert isinstance(module.ENV_VARS_TO_PROPAGATE, set)
    assert all(f'"{name}"' in inspect.getsource(module) for name in SECRETS)


def test_the_dashboards_libraries_are_those_that_ray_imports() -> None:
    found = importlib.util.find_spec("ray.dashboard.optional_deps")
    assert found and found.origin
    nodes = list(ast.walk(ast.parse(Path(found.origin).read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name if name.startswith("opentelemetry.") else name.partition(".")[0] for name in names} == {
        "opentelemetry",
        *ray_internals.DASHBOARD_LIBRARIES,
    }


@pytest.mark.system
def test_a_ray_of_a_jobs_own_runs_no_process_that_it_has_no_use_for() -> None:
    """One with --verbose has the processes that show what its nodes do."""
    program = f"""
import json
import psutil
from pipeline.cluster.session import connect, disconnect
found = []
for verbose in (True, False):
    connect(verbose=verbose, preload="ray.data")
    import ray
    assert ray.data.range(3).count() == 3
    from ray.data._internal.cluster_autoscaler import RateBasedClusterAutoscaler as Autoscaler
    assert Autoscaler.AUTOSCALING_REQUEST_EXPIRE_TIME_S == {autoscaler.FORGET_SECONDS:.0f}
    found.append([" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)])
    disconnect()
print(json.dumps(found))
"""
    environment = dict(os.environ)
    del environment["RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S"]  # tests/conftest.py
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=True, timeout=300, env=environment,
    )  # fmt: skip
    extra = ("monitor.py", "log_monitor.py", "dashboard.py")
    for lines, expected in zip(json.loads(done.stdout.splitlines()[-1]), (set(extra), set()), strict=True):
        assert any("raylet" in line for line in lines)
        assert {name for name in extra if any(f"/{name} " in line for line in lines)} == expected


def test_a_training_on_a_ray_without_a_dashboard_starts_no_cleaner(cluster: None) -> None:
    """The cleaner would look for the dashboard, and the training would wait for the cleaner at its end."""
    module: Any = data_parallel_trainer
    gcs, real = ray_internals.internal_kv_get_gcs_client(), module.PlacementGroupCleanerCallback
    assert real.__name__ == "PlacementGroupCleanerCallback"
    with ray_internals.no_cleaner_without_dashboard():
        assert not hasattr(module.PlacementGroupCleanerCallback(), "_stop_cleaner")
        module.DataParallelTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=1)).fit()
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    made = [actor["ActorClassName"] for actor in ray_internals.state.actor_table(None, job, None).values()]
    assert "TrainController" in made and "PlacementGroupCleaner" not in made
    try:
        gcs.internal_kv_put(b"dashboard", b"127.0.0.1:1", True, b"dashboard")
        with ray_internals.no_cleaner_without_dashboard():
            assert module.PlacementGroupCleanerCallback is real
    finally:
        gcs.internal_kv_del(b"dashboard", False, b"dashboard")
    assert module.PlacementGroupCleanerCallback is real


def test_an_elastic_controller_that_waits_pauses_and_is_soon_forgotten(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, elastic = (importlib.import_module(f"{POLICIES}.{name}") for name in (CLIENT, "elastic"))
    policy, decision = elastic.ElasticScalingPolicy, elastic.NoopDecision()
    # These are changed below, and restored after the test.
    monkeypatch.setattr(
        client, "AUTOSCALING_REQUESTS_EXPIRE_TIME_S", client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S
    )
    monkeypatch.setattr(policy, "make_decision_for_non_running_worker_group", lambda self: decision)
    ray_internals.wait_for_places(60, 0.2)
    scaling = ScalingConfig(num_workers=(1, 2), resources_per_worker={"CPU": 1})
    waiting, began = policy(scaling), time.monotonic()
    assert [waiting.make_decision_for_non_running_worker_group() for _ in range(5)] == [decision] * 5
    assert time.monotonic() - began >= 1
    decision = elastic.ResizeDecision(1, {})
    began = time.monotonic()
    assert waiting.make_decision_for_non_running_worker_group() is decision
    assert time.monotonic() - began < 0.2

    coordinator, mine = (
        ray_internals.get_or_create_autoscaling_coordinator(),
        client.TrainAutoscalingCoordinatorClient("me"),
    )
    try:
        mine.send_resource_request(scaling, 1)
        expires = ray.get(
            coordinator.__ray_call__.remote(
                lambda self: self._ongoing_reqs["me"].expiration_time - time.time()
            )
        )
        assert 30 < expires <= 60
    finally:
        mine.cancel_resource_request()
