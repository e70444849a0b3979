"""Check that volumes fit the pods that mount them: size, user, and how many nodes may share one."""

import re
from collections import Counter
from collections.abc import Iterator

from tests.k8s.references import containers, pod_templates
from tests.k8s.render import Object

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def size(quantity: str) -> int:
    """Bytes of a Kubernetes quantity."""
    found = re.fullmatch(r"(\d+)([A-Za-z]*)", quantity)
    assert found, quantity
    return int(found[1]) * UNITS[found[2]]


def misfits(objects: list[Object], one_node: bool) -> list[str]:
    """Every volume that does not fit, as "KIND/NAME: why".

    Args:
        one_node: all pods are on one node, so that they may share a ReadWriteOnce volume.
    """
    claims = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "PersistentVolumeClaim"}
    users, found = Counter[str](), []
    for thing in objects:
        made = {c["metadata"]["name"] for c in thing.get("spec", {}).get("volumeClaimTemplates", [])}
        for path, pod in pod_templates(thing):
            found += [
                f"{thing['kind']}/{thing['metadata']['name']}{path}: {why}" for why in _in_pod(pod, made)
            ]
            users.update(v["persistentVolumeClaim"]["claimName"] for v in _of(pod, "persistentVolumeClaim"))
    for name, count in users.items():
        if count > 1 and claims[name]["accessModes"] != ["ReadWriteMany"] and not one_node:
            found.append(f"PersistentVolumeClaim/{name}: {count} kinds of pods on several nodes mount it")
    found += [f"PersistentVolumeClaim/{name}: nothing mounts it" for name in claims.keys() - users.keys()]
    return found


def _of(pod: Object, kind: str) -> list[Object]:
    return [volume for volume in pod.get("volumes", []) if kind in volume]


def _in_pod(pod: Object, made: set[str]) -> Iterator[str]:
    disk = memory = 0
    for volume in _of(pod, "emptyDir"):
        settings = volume["emptyDir"]
        if "sizeLimit" not in settings:
            yield f"{volume['name']} may fill its node"
        elif settings.get("medium") == "Memory":
            memory += size(settings["sizeLimit"])
        else:
            disk += size(settings["sizeLimit"])
    limits = [container["resources"]["limits"] for container in pod["containers"]]
    if memory > sum(size(one["memory"]) for one in limits):
        yield "volumes in memory are larger than the memory"
    bounded = all("ephemeral-storage" in one for one in limits)
    # Equal is too much: a container's own files count as well.
    if bounded and disk >= sum(size(one["ephemeral-storage"]) for one in limits):
        yield "volumes on the node's disk are larger than the pod may use of it"
    if (made or _of(pod, "persistentVolumeClaim")) and "fsGroup" not in pod["securityContext"]:
        yield "its user can't write to the volumes that it claims"
    for container in containers(pod):
        places = Counter(mount["mountPath"].rstrip("/") for mount in container.get("volumeMounts", []))
        if twice := [place for place, count in places.items() if count > 1]:
            yield f"{container['name']} mounts {twice} twice"
        # /tmp is the home folder of our images, and Ray and MLflow keep temporary files there.
        if "ray-ddpm" in container["image"] and "/tmp" not in places:
            yield f"{container['name']} has a root that it can't write to, and no /tmp"
