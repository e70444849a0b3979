"""Compare the connections that pods make with those that the network policies allow."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.k8s.references import addresses, containers, matches, ports
from tests.k8s.render import Object

# Source, destination and port of a connection. ANY stands for every port.
Pair = tuple[str, str, int]
ANY = 0
RAY = ("head", "worker")
OUTSIDE = "outside"


@dataclass(frozen=True)
class Pod:
    """A kind of pod that an object creates.

    Attributes:
        name: the kind, such as `head`. Heads of all clusters are one kind, as only the cluster's name tells them apart.
        template: the pod's spec; None where KubeRay makes the pod without a template.
    """

    name: str
    labels: dict[str, str]
    template: Object | None


def pods(objects: list[Object]) -> list[Pod]:
    """Every kind of pod, with the labels that Kubernetes or KubeRay gives it."""
    found: dict[str, Pod] = {}
    for thing in objects:
        spec = thing.get("spec", {})
        spec = spec.get("jobTemplate", spec)
        if thing["kind"] in ("Deployment", "StatefulSet"):
            template = spec["template"]
            name = thing["metadata"]["name"]
            found[name] = Pod(name, template["metadata"]["labels"], template["spec"])
        cluster = spec if thing["kind"] == "RayCluster" else spec.get("rayClusterSpec")
        if cluster:
            for kind, groups in (
                ("head", [cluster["headGroupSpec"]]),
                ("worker", cluster.get("workerGroupSpecs", [])),
            ):
                labels = {"ray.io/is-ray-node": "yes", "ray.io/node-type": kind}
                for group in groups:
                    template = group["template"]
                    labels |= template.get("metadata", {}).get("labels", {})
                    found[kind] = Pod(kind, labels, template["spec"])
            if "gcsFaultToleranceOptions" in cluster:
                found["redis-cleanup"] = Pod("redis-cleanup", {"ray.io/node-type": "redis-cleanup"}, None)
        if "submitterPodTemplate" in spec:
            template = spec["submitterPodTemplate"]
            found["submitter"] = Pod("submitter", template["metadata"]["labels"], template["spec"])
    return list(found.values())


def talking(objects: list[Object]) -> set[Pair]:
    """Pairs that connect, by an address in a pod's settings or because Ray and KubeRay do so by themselves."""
    known = {(o["kind"], o["metadata"]["name"]): o for o in objects}
    every = pods(objects)
    pairs: set[Pair] = {(a, b, ANY) for a in RAY for b in RAY} | {("submitter", "head", 8265)}
    redis = {
        spec["gcsFaultToleranceOptions"]["redisAddress"]
        for o in objects
        if o["kind"] == "RayCluster" and "gcsFaultToleranceOptions" in (spec := o["spec"])
    }
    for pod in every:
        settings: list[Any] = list(redis) if pod.name in ("head", "redis-cleanup") else []
        for container in containers(pod.template) if pod.template else []:
            settings += [one.get("value", "") for one in container.get("env", [])]
            for source in container.get("envFrom", []):
                if "configMapRef" in source:
                    settings += known["ConfigMap", source["configMapRef"]["name"]]["data"].values()
        for host, port in addresses(settings):
            if ("Service", host) not in known:
                continue
            selector = known["Service", host]["spec"]["selector"]
            servers = [other.name for other in every if matches({"matchLabels": selector}, other.labels)]
            # A server that lists its own name does not call itself.
            pairs |= {(pod.name, name, port) for name in servers if name != pod.name}
    return pairs


def allowed(objects: list[Object]) -> tuple[set[Pair], set[Pair]]:
    """Pairs that egress rules allow, and pairs that ingress rules allow."""
    every = pods(objects)
    out, into = set[Pair](), set[Pair]()
    for policy in (o["spec"] for o in objects if o["kind"] == "NetworkPolicy"):
        chosen = [pod for pod in every if matches(policy["podSelector"], pod.labels)]
        for other, port in _peers(policy.get("egress", []), "to", every):
            out |= {(pod.name, other, port) for pod in chosen}
        for other, port in _peers(policy.get("ingress", []), "from", every):
            into |= {(other, pod.name, port) for pod in chosen}
    return out, into


def _peers(rules: list[Object], side: str, every: list[Pod]) -> Iterator[tuple[str, int]]:
    for rule in rules:
        ports = [port["port"] for port in rule.get("ports", [])] or [ANY]
        for peer in rule[side]:
            here = "podSelector" in peer and "namespaceSelector" not in peer
            names = (
                [pod.name for pod in every if matches(peer["podSelector"], pod.labels)] if here else [OUTSIDE]
            )
            yield from ((name, port) for name in names for port in ports)


def mistakes(objects: list[Object]) -> list[str]:
    """Connections that are made and not allowed, and those that are allowed and never made."""
    every, needed, (out, into) = pods(objects), talking(objects), allowed(objects)

    def covers(pairs: set[Pair], pair: Pair) -> bool:
        return pair in pairs or (*pair[:2], ANY) in pairs

    found = []
    for pair in sorted(needed):
        words = f"{pair[0]} to {pair[1]}:{pair[2] or '*'}"
        found += [f"{words} is not let out"] * (not covers(out, pair))
        found += [f"{words} is not let in"] * (not covers(into, pair))
    for name, pairs in (("out", out), ("in", into)):
        for pair in sorted(pairs):
            words = f"{pair[0]} to {pair[1]}:{pair[2] or '*'}"
            if OUTSIDE not in pair and not covers(needed, pair):
                found.append(f"{words} is let {name}, and never talks")
            listens = next(
                (ports(pod.template) for pod in every if pod.name == pair[1] and pod.template), set()
            )
            if pair[0] == OUTSIDE and pair[2] not in listens:
                found.append(f"{words} is let {name}, and nothing listens there")
    return found
