"""A cluster that can't be joined is reported in one line, and soon. Ray itself waits minutes and ignores Ctrl-C."""

import contextlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

from pipeline.cluster import joining
from pipeline.cluster.joining import check_joinable
from pipeline.errors import InputError
from tests.cluster.test_job_server import server
from tests.jobs.common import run_job

NODE = "ab" * 28


class Head(
    gcs_service_pb2_grpc.NodeInfoGcsServiceServicer, gcs_service_pb2_grpc.InternalKVGcsServiceServicer
):
    """The services of a cluster's head that a driver asks before it joins."""

    def __init__(self, version: str, python: str, state: int, token: str) -> None:
        self.version, self.python, self.state, self.token = version, python, state, token

    def CheckAlive(self, request: Any, context: Any) -> Any:
        if self.token and ("authorization", f"Bearer {self.token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: missing or incorrect")
        return gcs_service_pb2.CheckAliveReply(ray_version=self.version)

    def InternalKVGet(self, request: Any, context: Any) -> Any:
        assert (request.key, request.namespace) == (b"CLUSTER_METADATA", b"cluster")
        stored = {"ray_version": self.version, "python_version": self.python}
        return gcs_service_pb2.InternalKVGetReply(value=json.dumps(stored).encode())

    def GetAllNodeInfo(self, request: Any, context: Any) -> Any:
        asked = [selector.node_id for selector in request.node_selectors]
        assert asked == [bytes.fromhex(NODE)]
        info = gcs_pb2.GcsNodeInfo(node_id=asked[0], state=self.state)
        return gcs_service_pb2.GetAllNodeInfoReply(node_info_list=[info])


@contextlib.contextmanager
def head(
    version: str = ray.__version__,
    python: str = platform.python_version(),
    state: int = gcs_pb2.GcsNodeInfo.ALIVE,
    token: str = "",
) -> Iterator[str]:
    """Address of a head that gives these answers."""
    running = grpc.server(ThreadPoolExecutor(2))
    answers = Head(version, python, state, token)
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(answers, running)
    gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(answers, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        running.stop(0).wait()


@pytest.fixture(autouse=True)
def a_node_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node runs on this machine. The head says whether it belongs to its cluster."""
    monkeypatch.setattr("pipeline.cluster.ray_internals.find_node_ids", lambda: {NODE}, raising=False)
    monkeypatch.setattr(joining, "SECONDS", 2.0)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def refusal(address: str) -> str:
    """Return the one-line refusal of an address, which must come within seconds."""
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        check_joinable(address)
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_head_with_a_node_here_is_joined_whatever_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with head() as address:
        check_joinable(address)
        check_joinable(address.replace("127.0.0.1", "localhost"))


def test_a_head_of_another_version_is_refused_before_ray_waits_for_it() -> None:
    with head(version="2.9.0") as address:
        assert "runs Ray 2.9.0 and Python" in refusal(address)
    with head(python="3.9.1") as address:
        assert "Python 3.9.1, this environment has" in refusal(address)


def test_a_token_that_is_missing_is_asked_for() -> None:
    with head(token="x" * 64) as address:
        assert "set RAY_AUTH_MODE=token" in refusal(address)


def test_a_machine_without_a_node_of_the_cluster_is_told_so() -> None:
    with head(state=gcs_pb2.GcsNodeInfo.DEAD) as address:
        assert "no node of the cluster" in refusal(address) and address in refusal(address)


def test_what_does_not_answer_or_is_no_head_is_told() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert "Connection refused" in refusal(address)
        silent.listen()
        assert "is not the head of a Ray cluster" in refusal(address)
    with server(lambda path: (200, "hello")) as address:
        assert "is not the head of a Ray cluster" in refusal(address.removeprefix("http://"))


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("http://127.0.0.1:8265", "jobs/submit.py --address http://127.0.0.1:8265"),
        ("https://me:planted@ray.example", "the address of a job server"),
        ("ray://head:10001", "jobs/submit.py --address http://head:8265"),
        ("localhost", "expected HOST:PORT"),
        ("head:99999", "expected HOST:PORT"),
        ("head:port", "expected HOST:PORT"),
        ("head:6379/x", "expected HOST:PORT"),
        (":6379", "expected HOST:PORT"),
        ("[::1:6379", "expected HOST:PORT"),
        ("nowhere.invalid:6379", "no Ray cluster answers"),
    ],
)
def test_an_address_of_another_kind_is_explained(address: str, complaint: str) -> None:
    assert complaint in refusal(address) and "planted" not in refusal(address)


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("RAY_ADDRESS", "localhost", "expected HOST:PORT"),
        ("RAY_TMPDIR", "/tmp/" + "x" * 90, "RAY_TMPDIR names a folder for it, on a short path"),
        ("RAY_TMPDIR", "/proc", "Ray can't start in /proc/ray"),
    ],
)
def test_a_job_says_so_in_one_line(variable: str, value: str, complaint: str, tmp_path: Any) -> None:
    done = run_job("evaluate", "--model", "m", "--data", "d", home=tmp_path, timeout=60, **{variable: value})
    # What the job is doing is shown after a second.
    lines = [
        line for line in done.stderr.splitlines() if not re.match("evaluate: (starting|joining) Ray", line)
    ]
    assert done.code == 2 and complaint in done.stderr
    assert len(lines) == 1


@pytest.mark.slow
def test_a_node_and_agents_that_start_late_are_waited_for(tmp_path: Path) -> None:
    """On a busy machine they may need longer than Ray gives them.

    The driver gives the node half a minute to register. Its clock runs fast here, so that the half minute ends before.
    The raylet gives its agents 15 seconds to tell their ports, and ends.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "if any(word.endswith(('runtime_env/agent/main.py', 'dashboard/agent.py')) for word in sys.orig_argv):\n"
        "    time.sleep(17)\n"
    )
    program = """
import time, types
from ray._private import node, services
from pipeline.cluster.session import connect

node.time = types.SimpleNamespace(time=time.time, sleep=time.sleep, monotonic=lambda: 30 * time.monotonic())
get_node, late = services.get_node, []

def get_node_late(*where):
    found = get_node(*where)
    late.append(time.monotonic())
    if time.monotonic() < late[0] + 3:
        raise RuntimeError("not registered yet")
    return found

services.get_node = get_node_late
began = time.monotonic()
connect(preload="json")
print("joined", len(late) > 1)
import ray
print(ray.get(ray.remote(lambda: 1).remote()), time.monotonic() - began > 15)
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "joined True\n1 True\n"), done.stderr


def test_a_ray_that_does_not_start_in_time_is_told_in_one_line() -> None:
    """A process of its own is needed, since this one may already have a Ray."""
    program = """
import ray
from pipeline.cluster.session import connect

def init(**_):
    raise Exception("The current node timed out during startup. This could happen because …")

ray.init = init
try:
    connect()
except Exception as error:
    print(type(error).__name__, error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.startswith("Outage Ray did not start on this machine")
