"""What a job waits for where the cluster has no room for it now, in a line; and what no node can ever hold.

Ray waits for room without a word. Nodes may join and other jobs may end, so a job waits too, and its user sees for what.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from pipeline.cluster.ray_internals import placement_groups, state
from pipeline.cluster.session import is_own_ray
from pipeline.errors import InputError

POLL_SECONDS = 1.0
# A worker that has just been given its place is not known at once to have it.
PATIENCE_SECONDS = 10.0
REPEAT_SECONDS = 60.0
TRAIN_WORKERS = "RayTrainWorker"  # Ray Train's class


@dataclass(frozen=True)
class Need:
    """The least with which the work goes on: so many workers at a time.

    Attributes:
        each: resources that each of them reserves on its node.
        actor: how the names of their classes begin.
        flags: that ask for it, for messages.
    """

    count: int
    each: dict[str, float]
    actor: str
    flags: str


@contextlib.contextmanager
def announced(need: Need, say: Callable[[str], object]) -> Iterator[None]:
    """Says what the work inside waits for: once, then every minute, and when it changes; nothing while it has workers."""
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(need, say, done), daemon=True, name="room")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(PATIENCE_SECONDS)


def check_fits(need: Need) -> None:
    """Refuses what the cluster can never hold; what it can't hold now is waited for.

    Never: more than an autoscaler adds nodes up to; where there is none, a worker that is larger than every node, unless
    no node that works has joined yet; more than this machine has, where the job started a Ray of its own.

    Raises:
        InputError: says what there is.
    """
    limit, nodes = state.get_max_resources_from_cluster_config(), _nodes()
    wanted, room, lack = _wanted(need), _fitting(nodes, need), ""
    missing = next((name for name, amount in _sums(nodes, need).items() if not amount), "")
    if limit:  # Ray Train would fail for the same reason
        if any(limit.get(name, 0) < need.count * amount for name, amount in need.each.items()):
            most = _words({name: float(limit.get(name, 0)) for name in need.each})
            lack = f"{wanted} are needed, and the autoscaler adds nodes up to {most}"
    elif ray.cluster_resources().get("CPU") and not room:
        there = (
            f"the cluster has no {missing}" if missing else f"no node of the cluster has {_words(need.each)}"
        )
        lack = f"{there}, and no autoscaler adds one"
    elif room < need.count and is_own_ray():
        lack = f"{wanted} are needed, and this machine has {_words(_sums(nodes, need))}"
    if lack:
        raise InputError(f"{need.flags}: {lack}")


def places(need: Need) -> int:
    """How many of the workers the nodes that have joined can hold, in use or not."""
    return _fitting(_nodes(), need)


def shortage(need: Need) -> str:
    """What the work waits for, and what there is, in a line; empty where there is room for it."""
    free = list(state.available_resources_per_node().values())
    for nodes, what in ((_nodes(), ""), (free, " free")):
        if (room := _fitting(nodes, need)) < need.count:
            there = _sums(nodes, need)
            # Enough in all, on too many nodes.
            if all(there[name] >= need.count * amount for name, amount in need.each.items()):
                each = _words(need.each)
                wanted = (
                    f"a process of {each}" if need.count == 1 else f"{need.count} processes of {each} each"
                )
                return f"waiting for room for {wanted}, there is room for {room}"
            has = _words(there) if len(there) > 1 else f"{next(iter(there.values())):g}"
            return f"waiting for {_wanted(need)}, the cluster has {has}{what}"
    return ""


def _watch(need: Need, say: Callable[[str], object], done: threading.Event) -> None:
    said, when, since = "", 0.0, 0.0
    while not done.wait(POLL_SECONDS):
        try:
            line = "" if has_workers(need.actor) else shortage(need)
        except Exception:  # a node is going down, or Ray is: the next round asks again
            continue
        now = time.monotonic()
        since = (since or now) if line else 0.0
        if not line:
            said = ""
        elif now - since >= PATIENCE_SECONDS and (line != said or now - when >= REPEAT_SECONDS):
            say(line)
            said, when = line, now


def has_workers(actor: str) -> bool:
    """Whether any actor of this job whose class's name begins so has a process, and so its place on a node."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return any(
        entry["ActorClassName"].startswith(actor) and entry["Pid"]
        for phase in ("ALIVE", "PENDING_CREATION")
        for entry in state.actor_table(None, job, phase).values()
    )


def release_orphans() -> None:
    """Gives back what actors of this job that are dead have reserved and nobody will use.

    Ray Train's controller reserves its workers' places. Where it is killed, Ray keeps them until the job ends. Ray
    Train's own remedy asks the dashboard, which a job's own Ray has not, and fails where two Rays run on a machine.
    """
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id()).binary()
    for number, group in placement_groups().items():
        if group.creator_job_id == job and group.creator_actor_dead:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(number)))


def _nodes() -> list[dict[str, float]]:
    """What each node has, in use or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fitting(nodes: list[dict[str, float]], need: Need) -> int:
    """How many of the workers find room on nodes with these resources."""
    return sum(
        min(
            (_places(name, node.get(name, 0.0), amount) for name, amount in need.each.items()),
            default=need.count,
        )
        for node in nodes
    )


def _places(name: str, there: float, amount: float) -> int:
    """How often an amount can be taken of a node's resource; no process has parts of two GPUs."""
    if name == "GPU" and amount < 1:
        part = there - int(there)  # what is left of one that others use
        return int(there) * int(1 / amount + 1e-6) + int(part / amount + 1e-6)
    return int(there / amount + 1e-6)


def _sums(nodes: list[dict[str, float]], need: Need) -> dict[str, float]:
    return {name: sum(node.get(name, 0.0) for node in nodes) for name in need.each}


def _wanted(need: Need) -> str:
    return _words({name: need.count * amount for name, amount in need.each.items()})


def _words(amounts: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in amounts.items())
