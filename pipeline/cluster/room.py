"""Room for a job on the cluster: refuses what can never fit, and reports what a job waits for.

Ray waits for room without a message. Nodes may join and other jobs may end, so a job waits too, and tells its user why.
The choice of GPUs or CPUs and of the number of processes depends on what the cluster can become, so an autoscaler is
asked for the resources that the job wants.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from pipeline.cluster import autoscaler
from pipeline.cluster.ray_internals import placement_groups, state
from pipeline.cluster.session import is_own_ray
from pipeline.errors import InputError

POLL_SECONDS = 1.0
# Seconds before the first message. The place of an actor without a placement group is known when its process starts.
PATIENCE_SECONDS = 10.0
REPEAT_SECONDS = 60.0
# Seconds after the start without a place, although there is room, before the first message says so.
UNPLACED_SECONDS = 30.0
TRAIN_WORKERS = "RayTrainWorker"  # Ray Train's class


@dataclass(frozen=True)
class Need:
    """The smallest number of workers at a time with which the work can run.

    Attributes:
        count: number of workers.
        each: resources that each worker reserves on its node, by name.
        actor: beginning of the name of their actor class.
        flags: the flags that request them, for messages.
    """

    count: int
    each: dict[str, float]
    actor: str
    flags: str


@contextlib.contextmanager
def announced(need: Need, say: Callable[[str], object]) -> Iterator[None]:
    """Reports what the work inside this context waits for: at first, on each change and every minute.

    It reports nothing while the work has workers or their places.

    Args:
        say: called with each line.
    """
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(need, say, done), daemon=True, name="room")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(PATIENCE_SECONDS)


@dataclass(frozen=True)
class Cluster:
    """The facts about a cluster that decisions depend on.

    Attributes:
        nodes: resources of each live node, in use or not.
        growth: kind of autoscaler.
        limit: most that the cluster can ever have of each resource, if Ray knows it.
        own: True if the job started this Ray for itself.
    """

    nodes: list[dict[str, float]]
    growth: autoscaler.Growth = "none"
    limit: dict[str, int] | None = None
    own: bool = False

    def holds(self, need: Need) -> bool:
        """True if the live nodes can hold all the workers; resources in use count as free."""
        return _fitting(self.nodes, need) >= need.count

    def has_gpus(self, need: Need) -> bool:
        """True if the live nodes have enough GPUs, regardless of other resources."""
        gpus = need.count * need.each.get("GPU", 0.0)
        return 0 < gpus <= sum(node.get("GPU", 0.0) for node in self.nodes)


def look() -> Cluster:
    """The present facts about the cluster."""
    own, limit = is_own_ray(), state.get_max_resources_from_cluster_config()
    return Cluster(_nodes(), "none" if own else autoscaler.growth(), limit, own)


def settle(need: Need, say: Callable[[str], object]) -> None:
    """Refuses a need that the cluster can never hold, and waits while an autoscaler adds missing nodes.

    Without an autoscaler the work itself waits for missing resources, see `announced`.

    Args:
        say: called with each line for the user.

    Raises:
        InputError: says what the cluster has.
    """
    cluster = look()
    if lack := refusal(need, cluster):
        raise InputError(f"{need.flags}: {lack}")
    if cluster.growth == "none" or cluster.holds(need):
        return
    with announced(need, lambda line: say(f"{line}; the autoscaler is asked for nodes")):
        if not autoscaler.bring([need.each] * need.count, lambda: places(need) >= need.count):
            raise InputError(f"{need.flags}: {_unbringable(need, _nodes())}")


def choose_gpu(asked: bool | None, need: Callable[[bool], Need], say: Callable[[str], object]) -> bool:
    """Chooses between GPUs and CPUs, and makes room for the work (see `settle`).

    Args:
        asked: the user's choice; None = GPUs if the cluster has them or its autoscaler can add them.
        need: returns what the work needs with GPUs (True) or without (False).
        say: called with each line for the user.

    Returns:
        True if the work uses GPUs.

    Raises:
        InputError: as `settle` and `wants_gpu`.
    """
    cluster = look()
    if not wants_gpu(asked, need(True), cluster):
        settle(need(False), say)
        return False
    try:
        settle(need(True), say)
    except InputError as error:
        if asked or cluster.has_gpus(need(True)):
            raise
        say(f"{error}: on CPUs")
        settle(need(False), say)
        return False
    return True


def wants_gpu(asked: bool | None, need: Need, cluster: Cluster) -> bool:
    """True if the work should try GPUs first.

    Args:
        asked: the user's choice; None = none.
        need: what the work needs with GPUs.

    Raises:
        InputError: the autoscaler does not say whether it has GPUs, so the user must choose.
    """
    if asked is not None:
        return asked
    if cluster.growth == "silent" and not any(node.get("GPU") for node in cluster.nodes):
        raise InputError(
            "no GPU is up, and Ray's autoscaler of version 1 does not say whether it has any: "
            "give --gpu True to wait for GPUs, --gpu False to use CPUs"
        )
    return cluster.has_gpus(need) or cluster.growth != "none"


def refusal(need: Need, cluster: Cluster) -> str:
    """Why the cluster can never hold the need, as far as is known without asking the autoscaler; "" if it may.

    A need is refused in three cases. It is above the known limit of the autoscaler. Or no autoscaler runs, a node with
    CPUs has joined, and a worker is larger than every node. Or the job started its own Ray and this machine is too small.
    """
    nodes, limit = cluster.nodes, cluster.limit
    wanted, room, there = _wanted(need), _fitting(nodes, need), _sums(nodes, need)
    if limit:  # Ray Train would fail for the same reason
        if any(limit.get(name, 0) < need.count * amount for name, amount in need.each.items()):
            up_to = _words({name: float(limit.get(name, 0)) for name in need.each})
            return f"{wanted} are needed, and the autoscaler adds nodes up to {up_to}"
    elif cluster.growth == "none":
        if any(node.get("CPU") for node in nodes) and not room:
            missing = next((name for name, amount in there.items() if not amount), "")
            lack = (
                f"the cluster has no {missing}"
                if missing
                else f"no node of the cluster has {_words(need.each)}"
            )
            return f"{lack}, and no autoscaler adds one"
        if room < need.count and cluster.own:
            return f"{wanted} are needed, and this machine has {_words(there)}"
    return ""


def places(need: Need) -> int:
    """The number of such workers that the live nodes can hold; resources in use count as free."""
    return _fitting(_nodes(), need)


def most_places(need: Need, wanted: int) -> int:
    """The number of such workers that the cluster can hold with the nodes of its autoscaler, from 1 to `wanted`."""
    cluster = look()
    there = _fitting(cluster.nodes, need)
    if cluster.growth == "answers" and there < wanted:
        there = autoscaler.most(need.each, wanted, there)
    elif cluster.growth == "silent":
        there = wanted
    return max(1, min(there, wanted))


def shortage(need: Need) -> str:
    """A line that says what the work waits for and what the cluster has; "" if there is room for it."""
    free = list(state.available_resources_per_node().values())
    for nodes, what in ((_nodes(), ""), (free, " free")):
        if (room := _fitting(nodes, need)) < need.count:
            there = _sums(nodes, need)
            # The resources suffice in total, but are spread over too many nodes.
            if all(there[name] >= need.count * amount for name, amount in need.each.items()):
                return f"waiting for room for {_processes(need)}, there is room for {room}"
            has = _words(there) if len(there) > 1 else f"{next(iter(there.values())):g}"
            return f"waiting for {_wanted(need)}, the cluster has {has}{what}"
    return ""


def _unplaced(need: Need) -> str:
    """A line for a need that Ray has not placed yet, although there is room for it."""
    return f"waiting for Ray to place {_processes(need)}: it may keep the room for a job that was killed a short time ago"


def _processes(need: Need) -> str:
    each = _words(need.each)
    return f"a process of {each}" if need.count == 1 else f"{need.count} processes of {each} each"


def _unbringable(need: Need, nodes: list[dict[str, float]]) -> str:
    """A line that says what the autoscaler refused: the size of a worker, or the number of workers."""
    there = _fitting(nodes, need)
    if not there and need.count == 1:
        return f"no node of the cluster has {_words(need.each)}, and its autoscaler has no larger one"
    return f"{need.count} processes of {_words(need.each)} each are more than the autoscaler can bring"


def _watch(need: Need, say: Callable[[str], object], done: threading.Event) -> None:
    said, when, since, placed, began = "", 0.0, 0.0, False, time.monotonic()
    while not done.wait(POLL_SECONDS):
        now = time.monotonic()
        try:
            if has_workers(need.actor) or has_places(need.each):
                line, placed = "", True
            elif not (line := shortage(need)) and not placed and now - began >= UNPLACED_SECONDS:
                line = _unplaced(need)
        except Exception:  # a node or Ray is shutting down; the next round asks again
            continue
        since = (since or now) if line else 0.0
        if not line:
            said = ""
        elif now - since >= PATIENCE_SECONDS and (line != said or now - when >= REPEAT_SECONDS):
            say(line)
            said, when = line, now


def has_workers(actor: str) -> bool:
    """True if any actor of this job whose class name begins with `actor` has a process, and so a place on a node."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return any(
        entry["ActorClassName"].startswith(actor) and entry["Pid"]
        for phase in ("ALIVE", "PENDING_CREATION")
        for entry in state.actor_table(None, job, phase).values()
    )


def has_places(each: dict[str, float]) -> bool:
    """True if a placement group of this job holds such a worker's resources, whose process starts some time later."""
    return any(
        all(bundle.unit_resources.get(name, 0.0) >= amount for name, amount in each.items())
        for group in _own_groups().values()
        if group.state == group.CREATED and not _orphaned(group)
        for bundle in group.bundles
    )


def release_orphans() -> None:
    """Releases the placement groups of this job's dead actors.

    Ray Train's controller reserves its workers' places. If it is killed, Ray keeps the reservation until the job ends.
    Ray Train's own remedy needs the dashboard, which a job's own Ray lacks, and fails if two Rays run on one machine.
    """
    for number, group in _own_groups().items():
        if _orphaned(group):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(number)))


def _orphaned(group: Any) -> bool:
    """True if an actor made the group and is dead. Ray calls the actor dead too where the driver made the group."""
    made_by_actor = group.creator_actor_id != ray.ActorID.nil().binary()
    return bool(made_by_actor and group.creator_actor_dead)


def _own_groups() -> dict[str, Any]:
    """The placement groups of this job, by id in hex."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id()).binary()
    return {number: group for number, group in placement_groups().items() if group.creator_job_id == job}


def _nodes() -> list[dict[str, float]]:
    """The resources of each live node, in use or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fitting(nodes: list[dict[str, float]], need: Need) -> int:
    """The number of such workers that nodes with these resources can hold."""
    return sum(
        min(
            (_places(name, node.get(name, 0.0), amount) for name, amount in need.each.items()),
            default=need.count,
        )
        for node in nodes
    )


def _places(name: str, there: float, amount: float) -> int:
    """How many times a node's resource contains an amount. A process can't use parts of two GPUs."""
    if name == "GPU" and amount < 1:
        part = there - int(there)  # free share of a GPU that others use
        return int(there) * int(1 / amount + 1e-6) + int(part / amount + 1e-6)
    return int(there / amount + 1e-6)


def _sums(nodes: list[dict[str, float]], need: Need) -> dict[str, float]:
    return {name: sum(node.get(name, 0.0) for node in nodes) for name in need.each}


def _wanted(need: Need) -> str:
    return _words({name: need.count * amount for name, amount in need.each.items()})


def _words(amounts: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in amounts.items())
