"""Check that every name exists that an object refers to."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from tests.k8s.render import Object

# Kubernetes puts these into every namespace.
BUILT_IN = {("ConfigMap", "kube-root-ca.crt")}


def pod_templates(thing: Any, path: str = "") -> Iterator[tuple[str, Object]]:
    """Every pod template in an object, at any depth, with its path."""
    if isinstance(thing, dict):
        if isinstance(thing.get("containers"), list):
            yield path, thing
            return
        for key, child in thing.items():
            yield from pod_templates(child, f"{path}/{key}")
    elif isinstance(thing, list):
        for i, child in enumerate(thing):
            yield from pod_templates(child, f"{path}/{i}")


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def dangling(objects: list[Object], images: set[str]) -> list[str]:
    """Every reference without a target, as "KIND/NAME: what is missing".

    Args:
        objects: all that is in the namespace.
        images: known images, without tag and registry.
    """
    known = {(o["kind"], o["metadata"]["name"]): o for o in objects}
    problems = []

    def need(where: str, kind: str, name: str, key: str | None = None) -> None:
        if (kind, name) in BUILT_IN:
            return
        target = known.get((kind, name))
        if target is None:
            problems.append(f"{where}: no {kind} {name}")
        elif key is not None and key not in target.get("data", {}):
            problems.append(f"{where}: {kind} {name} has no key {key}")

    for thing in objects:
        where = f"{thing['kind']}/{thing['metadata']['name']}"
        for kind, name, key in _named(thing):
            need(where, kind, name, key)
        for host, port in addresses(thing):
            need(where, "Service", host)
            service = known.get(("Service", host))
            if service and port not in [p["port"] for p in service["spec"]["ports"]]:
                problems.append(f"{where}: Service {host} has no port {port}")
        for path, pod in pod_templates(thing):
            problems += [f"{where}{path}: {p}" for p in _inside(pod, images, thing)]
    return problems + _services(objects) + _policies(objects)


def _named(node: Any) -> Iterator[tuple[str, str, str | None]]:
    if isinstance(node, list):
        for child in node:
            yield from _named(child)
    if not isinstance(node, dict):
        return
    for key, child in node.items():
        if key in ("secretKeyRef", "configMapKeyRef"):
            yield ("Secret" if key[0] == "s" else "ConfigMap"), child["name"], child["key"]
        elif key in ("secretRef", "configMapRef"):
            yield ("Secret" if key[0] == "s" else "ConfigMap"), child["name"], None
        elif key == "secret" and "secretName" in child:
            yield "Secret", child["secretName"], None
        elif key == "configMap" and isinstance(child, dict):
            yield "ConfigMap", child["name"], None
        elif key == "persistentVolumeClaim":
            yield "PersistentVolumeClaim", child["claimName"], None
        elif key == "serviceAccountName":
            yield "ServiceAccount", child, None
        elif key == "serviceName" and isinstance(child, str):
            yield "Service", child, None
        yield from _named(child)


def addresses(node: Any) -> Iterator[tuple[str, int]]:
    """Every HOST:PORT of a service in this namespace, that is, without a dot in the host's name."""
    if isinstance(node, list | dict):
        for child in node.values() if isinstance(node, dict) else node:
            yield from addresses(child)
    elif isinstance(node, str) and " " not in node and "," not in node:
        try:
            url = urlsplit(node if "://" in node else f"//{node}")
            host, port = url.hostname, url.port
        except ValueError:
            return
        if host and port and "." not in host and host != "localhost":
            yield host, port


def _inside(pod: Object, images: set[str], thing: Object) -> Iterator[str]:
    """What is wrong with the volumes, mounts, probes and images of one pod."""
    volumes = {v["name"] for v in pod.get("volumes", [])}
    volumes |= {c["metadata"]["name"] for c in thing["spec"].get("volumeClaimTemplates", [])}
    used = set()
    for container in containers(pod):
        ports = {p["name"] for p in container.get("ports", [])}
        for mount in container.get("volumeMounts", []):
            used.add(mount["name"])
            if mount["name"] not in volumes:
                yield f"no volume {mount['name']}"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            check = container.get(probe, {})
            port = (check.get("httpGet") or check.get("tcpSocket") or {}).get("port")
            if port is not None and port not in ports:
                yield f"{probe}: no port {port}"
        name, _, tag = container["image"].rpartition("/")[2].partition(":")
        if name not in images:
            yield f"no image {name}"
        if not tag or tag == "latest":
            yield f"image {container['image']} is not pinned"
    if unused := volumes - used - {"autoscaler-token"}:
        yield f"volumes that nothing mounts: {unused}"


def labelled_pods(objects: list[Object]) -> list[tuple[dict[str, str], set[Any]]]:
    """Labels and ports (names and numbers) of every pod that these objects create."""
    found = []
    for thing in objects:
        spec = thing.get("spec", {})
        if thing["kind"] in ("Deployment", "StatefulSet"):
            template = spec["template"]
            found.append((template["metadata"]["labels"], ports(template["spec"])))
        if thing["kind"] == "RayCluster":  # KubeRay's labels
            groups = [("head", "headgroup", spec["headGroupSpec"])]
            groups += [("worker", g["groupName"], g) for g in spec["workerGroupSpecs"]]
            for kind, group, settings in groups:
                labels = {"ray.io/is-ray-node": "yes", "ray.io/node-type": kind, "ray.io/group": group}
                labels["ray.io/cluster"] = thing["metadata"]["name"]
                found.append((labels, ports(settings["template"]["spec"])))
        if thing["kind"] == "RayJob" and "submitterPodTemplate" in spec:
            found.append((spec["submitterPodTemplate"]["metadata"]["labels"], set()))
    return found


def ports(pod: Object) -> set[Any]:
    return {p[k] for c in pod["containers"] for p in c.get("ports", []) for k in ("name", "containerPort")}


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector matches; it may have matchLabels, and matchExpressions with In."""
    assert set(selector) <= {"matchLabels", "matchExpressions"}, selector
    assert all(e["operator"] == "In" for e in selector.get("matchExpressions", []))
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items()) and all(
        labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", [])
    )


def _services(objects: list[Object]) -> list[str]:
    pods, problems = labelled_pods(objects), []
    for thing in objects:
        name = f"{thing['kind']}/{thing['metadata']['name']}"
        if thing["kind"] == "Service":
            behind = [p for labels, p in pods if matches({"matchLabels": thing["spec"]["selector"]}, labels)]
            if not behind:
                problems.append(f"{name}: selects no pod")
            for port in thing["spec"]["ports"]:
                if any(port["targetPort"] not in ports for ports in behind):
                    problems.append(f"{name}: no pod has port {port['targetPort']}")
        if thing["kind"] == "PodDisruptionBudget" and not any(
            matches(thing["spec"]["selector"], labels) for labels, _ in pods
        ):
            problems.append(f"{name}: selects no pod")
    return problems


def _policies(objects: list[Object]) -> list[str]:
    """Policies that select no pod, allow a port that no pod has, or name a peer that this namespace lacks."""
    pods, problems = labelled_pods(objects), []
    for thing in objects:
        if thing["kind"] != "NetworkPolicy":
            continue
        spec, name = thing["spec"], f"NetworkPolicy/{thing['metadata']['name']}"
        chosen = [ports for labels, ports in pods if matches(spec["podSelector"], labels)]
        if not chosen:
            problems.append(f"{name}: selects no pod")
        for rule in spec.get("ingress", []):
            for port in rule.get("ports", []):
                if not any(port["port"] in ports for ports in chosen):
                    problems.append(f"{name}: no selected pod has port {port['port']}")
        rules = [(r, "from") for r in spec.get("ingress", [])] + [(r, "to") for r in spec.get("egress", [])]
        for rule, side in rules:
            for peer in rule[side]:
                if "namespaceSelector" in peer or "podSelector" not in peer:
                    continue
                found = [ports for labels, ports in pods if matches(peer["podSelector"], labels)]
                if not found:
                    problems.append(f"{name}: peer {peer['podSelector']} is no pod")
                for port in rule.get("ports", []) if side == "to" else []:
                    if not any(port["port"] in ports for ports in found):
                        problems.append(f"{name}: no peer has port {port['port']}")
    return problems
