"""Checks within seconds that the cluster at RAY_ADDRESS can be joined. Ray would wait minutes and ignore Ctrl-C."""

import json
import platform
import socket
import time
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import InputError, Outage
from pipeline.redact import one_line, redact

# Time limit of one request, and of the wait for a node of the cluster on this machine.
SECONDS = 10.0
WITHOUT = "unset it to start a Ray of this job's own"


def check_joinable(address: str) -> None:
    """Checks that this process can become a driver of the cluster at RAY_ADDRESS.

    Args:
        address: HOST:PORT of the cluster's head; "auto" = the Ray that was started last on this machine.

    Raises:
        InputError: another program answers, the cluster refuses the token, its versions of Ray or Python differ, or none
            of its nodes runs on this machine.
        Outage: nothing answers.
    """
    host, port = _parsed(_found() if address == "auto" else address)
    name = f"RAY_ADDRESS={address}" + (f" ({host}:{port})" if address == "auto" else "")
    # Ray's own client can't be interrupted while it waits for an address where nothing answers.
    try:
        socket.create_connection((host, port), SECONDS).close()
    except OSError as error:
        raise Outage(f"no Ray cluster answers at {name}: {one_line(error)}; {WITHOUT}") from None
    _ask(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", name)


def _found() -> str:
    from pipeline.cluster.ray_internals import canonicalize_bootstrap_address_or_die

    try:
        return str(canonicalize_bootstrap_address_or_die("auto"))
    except ConnectionError:
        raise InputError(f"RAY_ADDRESS=auto: no Ray runs on this machine; {WITHOUT}") from None


def _parsed(address: str) -> tuple[str, int]:
    """Host and port."""
    scheme, is_uri, rest = address.rpartition("://")
    shown = redact(address)
    try:
        url = urlsplit(f"//{rest}")
        host, port = url.hostname or "", url.port or 0
    except ValueError:
        host, port = "", 0
    if is_uri and scheme in ("http", "https"):
        raise InputError(
            f"RAY_ADDRESS={shown} is the address of a job server: `jobs/submit.py --address {shown}` sends it a job; "
            "to run here, on a node of the cluster, give HOST:6379"
        )
    if is_uri:
        raise InputError(
            f"RAY_ADDRESS={shown}: jobs don't run through Ray's client: send this one with `jobs/submit.py --address "
            f"http://{host or 'HOST'}:8265`, or run it on a node of the cluster with RAY_ADDRESS=HOST:6379"
        )
    if not host or not port or rest != url.netloc or "@" in rest:
        raise InputError(f"RAY_ADDRESS={shown}: expected HOST:PORT, such as 10.0.0.1:6379; {WITHOUT}")
    return host, port


def _ask(target: str, name: str) -> None:
    """Asks the head of the cluster for its versions and its nodes.

    Args:
        target: HOST:PORT for gRPC.
        name: the address, for messages.

    Raises:
        InputError: as `check_joinable`.
    """
    import grpc

    from pipeline.cluster import ray_internals as internals

    try:
        # No HTTP proxy, as in Ray's own client.
        channel = internals.init_grpc_channel(target, [("grpc.enable_http_proxy", 0)])
    except (OSError, RuntimeError, ValueError) as error:  # a token or a certificate that can't be read
        raise InputError(f"{name}: {one_line(error)}") from None
    with channel:
        nodes = internals.NodeInfoGcsServiceStub(channel)
        settings = internals.InternalKVGcsServiceStub(channel)
        try:
            alive = nodes.CheckAlive(internals.CheckAliveRequest(), timeout=SECONDS)
            request = internals.InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
            stored = settings.InternalKVGet(request, timeout=SECONDS).value
            _check_versions(alive.ray_version, stored, name)
            _check_node(nodes, name)
        except grpc.RpcError as error:
            raise InputError(_refusal(error, name)) from None


def _refusal(error: Any, name: str) -> str:
    import grpc

    words = one_line(error.details() or error.code().name)
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return f"the cluster at {name} refuses this driver: set RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN ({words})"
    return f"the server at {name} is not the head of a Ray cluster: {words}; {WITHOUT}"


def _check_versions(version: str, stored: bytes, name: str) -> None:
    """Refuses a cluster with another version of Ray or Python, which Ray can't join."""
    import ray

    here = {"Ray": ray.__version__, "Python": platform.python_version()}
    there = {"Ray": version, "Python": json.loads(stored)["python_version"] if stored else here["Python"]}
    if here != there:
        theirs, ours = (" and ".join(f"{k} {v}" for k, v in one.items()) for one in (there, here))
        raise InputError(
            f"the cluster at {name} runs {theirs}, this environment has {ours}: a driver needs the same; "
            "jobs/submit.py sends a job from another environment"
        )


def _check_node(nodes: Any, name: str) -> None:
    """Refuses a cluster without a node on this machine, because a driver needs one."""
    from pipeline.cluster import ray_internals as internals

    end = time.monotonic() + SECONDS
    while True:
        # Ray looks for a node in the same way. The head may not know a node that has just started.
        mine = [bytes.fromhex(identity) for identity in internals.find_node_ids()]
        if mine:
            chosen = [internals.GetAllNodeInfoRequest.NodeSelector(node_id=one) for one in mine]
            request = internals.GetAllNodeInfoRequest(node_selectors=chosen)
            known = nodes.GetAllNodeInfo(request, timeout=SECONDS).node_info_list
            if any(node.state == internals.GcsNodeInfo.ALIVE for node in known):
                return
        if time.monotonic() > end:
            raise InputError(
                f"no node of the cluster at {name} runs on this machine: start one with `ray start --address`, "
                "or send the job with jobs/submit.py"
            )
        time.sleep(0.5)
