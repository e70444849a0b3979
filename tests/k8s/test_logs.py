"""The component that ships Ray's log files: every Ray node has it, it finds the files, it may reach its destination."""

import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.k8s import schemas
from tests.k8s.network import OUTSIDE, RAY, allowed, mistakes
from tests.k8s.references import dangling, pod_templates
from tests.k8s.render import K8S, Object, render
from tests.k8s.test_manifests import IMAGES, find
from tests.k8s.volumes import misfits, size

DESTINATIONS = ["s3", "loki"]


@pytest.fixture(scope="module", params=list(product(["local", "gpu"], DESTINATIONS)), ids="-".join)
def shipped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, list[Object]]:
    """An overlay, a destination, and all that is applied once an operator has added the component."""
    overlay, destination = request.param
    copy = tmp_path_factory.mktemp("logs") / "k8s"
    shutil.copytree(K8S, copy, ignore=shutil.ignore_patterns("*.env"))
    for folder, above in (
        (f"overlays/{overlay}", "../../logs"),
        (f"overlays/{overlay}/jobs", "../../../logs"),
    ):
        file = copy / folder / "kustomization.yaml"
        settings = yaml.safe_load(file.read_text())
        settings["components"].insert(0, above)
        file.write_text(yaml.dump(settings))
    folders = (f"overlays/{overlay}", f"overlays/{overlay}/jobs", f"logs/{destination}")
    return overlay, destination, [thing for folder in folders for thing in render(copy / folder)]


def nodes(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """The pod of every head and of every group of workers, with its place."""
    for thing in objects:
        for path, pod in pod_templates(thing):
            if pod["containers"][0]["name"] in ("ray-head", "ray-worker"):
                yield schemas.path_of(thing) + path, pod


def pipeline(objects: list[Object]) -> tuple[Object, Object]:
    """Fluent Bit's input and output."""
    text = find(objects, "ConfigMap", "ray-logs")["data"]["fluent-bit.yaml"]
    parts = yaml.safe_load(text)["pipeline"]
    (read,), (sent,) = parts["inputs"], parts["outputs"]
    return read, sent


def below(place: str, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    """The mount that a path lies in."""
    found = [mount for mount in mounts if place.startswith(mount["mountPath"].rstrip("/") + "/")]
    return max(found, key=lambda mount: len(mount["mountPath"]))


def test_every_ray_node_ships_the_files_that_ray_writes(shipped: tuple[str, str, list[Object]]) -> None:
    overlay, _, objects = shipped
    read, sent = pipeline(objects)
    found = dict(nodes(objects))
    # A head and its groups: standing, and in five jobs and the nightly one.
    assert len(found) == {"local": 2 * 7, "gpu": 4 + 2 + 2 + 4 * 3}[overlay]
    for where, pod in found.items():
        (ray,) = pod["containers"]
        (logs,) = pod["initContainers"]
        assert logs["restartPolicy"] == "Always", where  # else the pod would wait for its end
        mounts = logs["volumeMounts"]
        for pattern in read["path"].split(","):
            mine = below(pattern, mounts)
            assert mine["readOnly"] and {k: mine[k] for k in ("name", "mountPath")} in ray["volumeMounts"], (
                where
            )
        for place in (read["db"], *([sent["store_dir"]] if "store_dir" in sent else [])):
            (volume,) = [v for v in pod["volumes"] if v["name"] == below(place, mounts)["name"]]
            assert not below(place, mounts).get("readOnly"), where
            if "store_dir_limit_size" in sent:
                assert size(sent["store_dir_limit_size"]) < size(volume["emptyDir"]["sizeLimit"]), where
        (argument,) = logs["args"]
        assert below(argument.removeprefix("--config="), mounts)["name"] == "logs-config"


def test_with_it_everything_is_valid_fits_and_may_talk(
    shipped: tuple[str, str, list[Object]], secrets: list[Object]
) -> None:
    overlay, _, objects = shipped
    for thing in objects:
        if thing["apiVersion"].startswith("ray.io/"):
            schemas.check(thing)
    assert dangling(objects + secrets, IMAGES | {"fluent-bit"}) == []
    assert misfits(objects, one_node=overlay == "local") == []
    assert mistakes(objects) == []


def test_it_is_as_locked_down_as_ray(shipped: tuple[str, str, list[Object]]) -> None:
    for where, pod in nodes(shipped[2]):
        assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False, where
        (logs,) = pod["initContainers"]
        assert logs["securityContext"] == pod["containers"][0]["securityContext"], where
        assert logs["securityContext"]["readOnlyRootFilesystem"] is True, where
        assert logs["resources"]["requests"].keys() >= {"cpu", "memory", "ephemeral-storage"}, where
        assert logs["resources"]["limits"].keys() >= {"memory", "ephemeral-storage"}, where


def test_its_destination_is_one_that_a_policy_lets_it_reach(shipped: tuple[str, str, list[Object]]) -> None:
    overlay, destination, objects = shipped
    _, sent = pipeline(objects)
    out, into = allowed(objects)
    if destination == "loki":
        rule = find(objects, "NetworkPolicy", "ray-to-loki")["spec"]["egress"][0]
        space = rule["to"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        assert sent["host"].split(".")[1] == space
        assert {(node, OUTSIDE, sent["port"]) for node in RAY} <= out
        return
    assert not [o for o in objects if o["metadata"]["name"] == "ray-to-loki"]
    assert sent["endpoint"] == "${AWS_ENDPOINT_URL}"
    address = urlsplit(find(objects, "ConfigMap", "ray-settings")["data"]["AWS_ENDPOINT_URL"])
    if overlay == "local":
        assert {(node, address.hostname, address.port) for node in RAY} <= out & into
    else:
        assert address.scheme == "https" and {(node, OUTSIDE, 443) for node in RAY} <= out


def test_every_variable_of_its_settings_is_set(
    shipped: tuple[str, str, list[Object]], secrets: list[Object]
) -> None:
    objects = shipped[2]
    named = set(re.findall(r"\$\{(\w+)\}", find(objects, "ConfigMap", "ray-logs")["data"]["fluent-bit.yaml"]))
    assert named
    for where, pod in nodes(objects):
        (logs,) = pod["initContainers"]
        have = {one["name"] for one in logs["env"]}
        for source in logs["envFrom"]:
            ((kind, reference),) = source.items()
            holder = {"configMapRef": "ConfigMap", "secretRef": "Secret"}[kind]
            have |= find(objects + secrets, holder, reference["name"])["data"].keys()
        assert named | {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= have, where


@pytest.mark.parametrize("destination", DESTINATIONS)
def test_each_log_file_is_found_once(destination: str, tmp_path: Path) -> None:
    """The places of Ray's files, with its link to the newest session."""
    read, _ = pipeline(render(K8S / "logs" / destination))
    written = [
        f"session_2026-01-0{day}_10-00-00_000001_7/logs/{name}"
        for day in (1, 2)
        for name in ("raylet.out", "job-driver-a.log", "raylet.err.1", "train/ray-train-app-controller.log")
    ]
    for name in (*written, "session_2026-01-02_10-00-00_000001_7/logs/debug_state.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a line\n")
    (tmp_path / "session_latest").symlink_to(tmp_path / "session_2026-01-02_10-00-00_000001_7")
    patterns = [pattern.removeprefix("/tmp/ray/") for pattern in read["path"].split(",")]
    found = [path for pattern in patterns for path in tmp_path.glob(pattern) if path.is_file()]
    found = [path for path in found if not fnmatch(str(path), read["exclude_path"])]
    assert sorted(found) == sorted(tmp_path / name for name in written)


def test_the_destinations_differ_in_nothing_else() -> None:
    settings = [yaml.safe_load((K8S / "logs" / one / "fluent-bit.yaml").read_text()) for one in DESTINATIONS]
    for one in settings:
        (sent,) = one["pipeline"].pop("outputs")
        assert sent["match"] == one["pipeline"]["inputs"][0]["tag"]
    assert settings[0] == settings[1]
