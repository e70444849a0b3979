"""The nodes that Ray's autoscaler adds to a cluster on request.

Ray's `request_resources` keeps only its last call, whoever made it. So Ray Data and Ray Train send their requests to
one actor, which requests the sum. This module uses the same actor, beside them and beside other jobs. The actor drops a
request that is not repeated, so the request of a killed job expires.
"""

import contextlib
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal

import ray

from pipeline.cluster.ray_internals import (
    DEBUG_AUTOSCALING_STATUS,
    GetClusterStatusReply,
    get_or_create_autoscaling_coordinator,
    internal_kv_get_gcs_client,
    is_autoscaler_v2,
)

POLL_SECONDS, REPEAT_SECONDS, FORGET_SECONDS, CALL_SECONDS = 1.0, 20.0, 60.0, 10.0
ANSWER_SECONDS = 30.0
# Without an autoscaler, the report of Ray's version 1 lists each node as a type of its own.
_NODE_AS_TYPE = re.compile("node_[0-9a-f]+")
# The autoscaler: none; one that answers whether it can add nodes; one that does not answer (version 1).
Growth = Literal["none", "answers", "silent"]
# Its answer to a request; crowded = it can't satisfy the sum of all requests, so nothing is known about this one.
Answer = Literal["unheard", "can", "never", "crowded"]
Bundle = dict[str, float]
Shape = frozenset[tuple[str, float]]
# By shape: the largest number of bundles known to fit the cluster some day, and the smallest number known not to fit.
_known: dict[Shape, tuple[int, int]] = {}


def growth() -> Growth:
    """The kind of autoscaler of the joined cluster."""
    client = internal_kv_get_gcs_client()
    if is_autoscaler_v2(fetch_from_server=True, gcs_client=client):
        return "answers"
    return "silent" if adds_nodes(client.internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), None)) else "none"


def adds_nodes(report: bytes | None) -> bool:
    """True if a report of Ray's version 1 comes from an autoscaler, which knows types of nodes."""
    about = json.loads(report or "{}").get("autoscaler_report") or {}
    types = {*(about.get("active_nodes") or {}), *(about.get("idle_nodes") or {})}
    return any(not _NODE_AS_TYPE.fullmatch(name) for name in types)


def bring(bundles: Sequence[Bundle], arrived: Callable[[], bool]) -> bool:
    """Requests nodes with room for all bundles at once, until they have joined.

    The request ends on return, also after an error or a signal. Work on the nodes then keeps them. The request must end,
    because Ray Data does not use the room of any request, not even one of its own job.

    Args:
        bundles: resources of each process, by name.
        arrived: returns True once the nodes have joined.

    Returns:
        False if the autoscaler answers that the cluster can never hold the bundles. True once the nodes have joined, or
        if other jobs' requests keep the autoscaler from satisfying any. It then still adds nodes for waiting processes,
        which it counts one by one.
    """
    crowded = 0
    with contextlib.closing(_answers(bundles)) as answers:
        for said in answers:
            if arrived():
                return True
            if said == "never":
                return False
            crowded = crowded + 1 if said == "crowded" else 0
            if crowded * POLL_SECONDS > ANSWER_SECONDS:
                return True
    raise AssertionError("answers have no end")


def most(each: Bundle, wanted: int, there: int) -> int:
    """The number of bundles, up to `wanted`, that a cluster whose autoscaler answers can hold some day.

    Args:
        each: resources of one bundle, by name.
        wanted: number of bundles that the job could use.
        there: number of bundles that fit the present nodes.
    """
    shape = frozenset(each.items())
    fit, too_many = _known.get(shape, (0, sys.maxsize))
    fit, number = max(fit, there), wanted
    while fit < min(wanted, too_many - 1):
        number = min(number, too_many - 1)
        can = _could([each] * number)
        if can is None:  # other jobs request too much as well, so only the present nodes are certain
            break
        fit, too_many = (number, too_many) if can else (fit, number)
        number = (fit + too_many) // 2
    _known[shape] = fit, too_many
    return min(fit, wanted)


def _could(bundles: Sequence[Bundle]) -> bool | None:
    """True if the cluster can hold the bundles some day; None if the autoscaler does not answer."""
    end = time.monotonic() + ANSWER_SECONDS
    with contextlib.closing(_answers(bundles)) as answers:
        said = next((one for one in answers if one in ("can", "never") or time.monotonic() > end), "unheard")
    return {"can": True, "never": False}.get(said)


def answer(status: Any, wanted: Counter[Shape], since: int) -> Answer:
    """The autoscaler's answer to a request. It answers only for the sum of all requests.

    Args:
        status: Ray's `GetClusterStatusReply`.
        wanted: the requested bundles.
        since: first version of the cluster's state that contained the request; 0 = none yet.
    """
    about = status.autoscaling_state
    refused = [_shapes(one) for one in about.infeasible_cluster_resource_constraints]
    if wanted in refused:
        return "never"
    if not 0 < since <= about.last_seen_cluster_resource_state_version:
        return "unheard"
    return "crowded" if refused else "can"


def _answers(bundles: Sequence[Bundle]) -> Generator[Answer, None, None]:
    """Yields the autoscaler's answer every second, and repeats the request until the iterator is closed."""
    wanted = Counter(frozenset(bundle.items()) for bundle in bundles)
    name, since, sent = f"ray-ddpm-{ray.get_runtime_context().get_job_id()}", 0, -math.inf
    try:
        while True:
            said: Answer = "unheard"
            with contextlib.suppress(ray.exceptions.RayError):  # the next round asks again
                if time.monotonic() - sent >= REPEAT_SECONDS:
                    # Each time anew, because the actor dies with the node of its first user.
                    asked = get_or_create_autoscaling_coordinator().request_resources.remote(
                        requester_id=name, resources=list(bundles), expire_after_s=FORGET_SECONDS
                    )
                    ray.get(asked, timeout=CALL_SECONDS)
                    sent = time.monotonic()
                status = _status()
                now = status.cluster_resource_state
                if not since and any(wanted <= _shapes(one) for one in now.cluster_resource_constraints):
                    since = now.cluster_resource_state_version
                said = answer(status, wanted, since)
            yield said
            time.sleep(POLL_SECONDS)
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            cancelled = get_or_create_autoscaling_coordinator().cancel_request.remote(requester_id=name)
            ray.get(cancelled, timeout=CALL_SECONDS)


def _status() -> Any:
    return GetClusterStatusReply.FromString(
        internal_kv_get_gcs_client().get_cluster_status(timeout_s=CALL_SECONDS)
    )


def _shapes(constraint: Any) -> Counter[Shape]:
    """The bundles of a request, from one of Ray's messages."""
    counted: Counter[Shape] = Counter()
    for entry in constraint.resource_requests:
        counted[frozenset(entry.request.resources_bundle.items())] += entry.count
    return counted
