"""What a cluster may become: nodes that Ray's autoscaler adds when it is asked for them.

It is asked with `ray.autoscaler.sdk.request_resources`, whose last call counts alone, whoever made it. So Ray Data and
Ray Train tell one actor what they need, which asks for the sum; and so does this, beside them and beside other jobs. The
actor forgets a request that is not repeated: that of a job which was killed ends by itself.
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
# Where no autoscaler runs, each node stands in the report of Ray's version 1 as a type of its own.
_NODE_AS_TYPE = re.compile("node_[0-9a-f]+")
# What adds nodes: nothing; one that says what it can't add; one that doesn't say.
Growth = Literal["none", "answers", "silent"]
# What it says of a request: crowded = it can't bring the sum of all requests, so nothing is known of this one.
Answer = Literal["unheard", "can", "never", "crowded"]
Bundle = dict[str, float]
Shape = frozenset[tuple[str, float]]
# The most and the fewest of a shape that are known to fit some day, and not to fit.
_known: dict[Shape, tuple[int, int]] = {}


def growth() -> Growth:
    """What adds nodes to the cluster that was joined."""
    client = internal_kv_get_gcs_client()
    if is_autoscaler_v2(fetch_from_server=True, gcs_client=client):
        return "answers"
    return "silent" if adds_nodes(client.internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), None)) else "none"


def adds_nodes(report: bytes | None) -> bool:
    """Whether a report of Ray's version 1 is that of an autoscaler, which has types of nodes."""
    about = json.loads(report or "{}").get("autoscaler_report") or {}
    types = {*(about.get("active_nodes") or {}), *(about.get("idle_nodes") or {})}
    return any(not _NODE_AS_TYPE.fullmatch(name) for name in types)


def bring(bundles: Sequence[Bundle], arrived: Callable[[], bool]) -> bool:
    """Asks for nodes with room for all bundles at once, until they have joined.

    The request ends here, also by an error or a signal: what runs on the nodes then holds them. It must, since Ray Data
    leaves the room of other requests alone, those of its own job as well.

    Returns:
        False where the autoscaler says that the cluster can never hold them. True as well where others ask for so much
        that it does nothing for any request: processes that wait for a place are counted one by one, and bring nodes.
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
    """How many of so many bundles the cluster holds some day, where its autoscaler answers.

    Args:
        there: that fit its nodes now.
    """
    shape = frozenset(each.items())
    fit, too_many = _known.get(shape, (0, sys.maxsize))
    fit, number = max(fit, there), wanted
    while fit < min(wanted, too_many - 1):
        number = min(number, too_many - 1)
        can = _could([each] * number)
        if can is None:  # others ask for too much as well: what is there is sure
            break
        fit, too_many = (number, too_many) if can else (fit, number)
        number = (fit + too_many) // 2
    _known[shape] = fit, too_many
    return min(fit, wanted)


def _could(bundles: Sequence[Bundle]) -> bool | None:
    """Whether the cluster can hold them some day; None where no answer comes."""
    end = time.monotonic() + ANSWER_SECONDS
    with contextlib.closing(_answers(bundles)) as answers:
        said = next((one for one in answers if one in ("can", "never") or time.monotonic() > end), "unheard")
    return {"can": True, "never": False}.get(said)


def answer(status: Any, wanted: Counter[Shape], since: int) -> Answer:
    """What the autoscaler says of so many bundles. It answers to the sum of all requests.

    Args:
        status: Ray's `GetClusterStatusReply`.
        since: the version of the cluster's state that was the first with the request; 0 = none was yet.
    """
    about = status.autoscaling_state
    refused = [_shapes(one) for one in about.infeasible_cluster_resource_constraints]
    if wanted in refused:
        return "never"
    if not 0 < since <= about.last_seen_cluster_resource_state_version:
        return "unheard"
    return "crowded" if refused else "can"


def _answers(bundles: Sequence[Bundle]) -> Generator[Answer, None, None]:
    """What the autoscaler says, every second; it is asked until the iterator is closed."""
    wanted = Counter(frozenset(bundle.items()) for bundle in bundles)
    coordinator = get_or_create_autoscaling_coordinator()
    name, since, sent = f"ray-ddpm-{ray.get_runtime_context().get_job_id()}", 0, -math.inf
    try:
        while True:
            said: Answer = "unheard"
            with contextlib.suppress(ray.exceptions.RayError):  # the next round asks again
                if time.monotonic() - sent >= REPEAT_SECONDS:
                    asked = coordinator.request_resources.remote(
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
            ray.get(coordinator.cancel_request.remote(requester_id=name), timeout=CALL_SECONDS)


def _status() -> Any:
    return GetClusterStatusReply.FromString(
        internal_kv_get_gcs_client().get_cluster_status(timeout_s=CALL_SECONDS)
    )


def _shapes(constraint: Any) -> Counter[Shape]:
    """The bundles of a request, as Ray's messages hold them."""
    counted: Counter[Shape] = Counter()
    for entry in constraint.resource_requests:
        counted[frozenset(entry.request.resources_bundle.items())] += entry.count
    return counted
