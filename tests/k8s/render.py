"""What `kubectl apply -k` would send: by a real kustomize where there is one, else by the little one here.

The little one knows what k8s/ uses and refuses everything else; a test holds it against the real one.
"""

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
KNOWN = {
    "apiVersion", "kind", "resources", "components", "patches", "namespace", "images", "replacements",
    "secretGenerator", "generatorOptions",
}  # fmt: skip


def real_command() -> list[str] | None:
    """The kustomize of this machine, if it has one."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


def render(folder: Path) -> list[Object]:
    """All objects of a kustomization, by the best kustomize at hand."""
    command = real_command()
    return render_real(command, folder) if command else render_little(folder)


def render_real(command: list[str], folder: Path) -> list[Object]:
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def render_little(folder: Path) -> list[Object]:
    local = "config.kubernetes.io/local-config"
    return [o for o in _build(folder, []) if local not in o["metadata"].get("annotations", {})]


def _build(folder: Path, objects: list[Object]) -> list[Object]:
    """Resources, then components, then what this kustomization itself changes, in kustomize's order."""
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(settings) - KNOWN:
        raise NotImplementedError(f"{folder}: {unknown}")
    for name in settings.get("resources", []):
        path = folder / name
        objects += _build(path, []) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for name in settings.get("components", []):
        objects = _build(folder / name, objects)
    if "secretGenerator" in settings:
        if settings.get("generatorOptions") != {"disableNameSuffixHash": True}:
            raise NotImplementedError("hashed names")
        objects += [_secret(folder, entry) for entry in settings["secretGenerator"]]
    for entry in settings.get("patches", []):
        operations = yaml.safe_load(
            entry["patch"] if "patch" in entry else (folder / entry["path"]).read_text()
        )
        for target in _selected(objects, entry["target"]):
            for operation in operations:
                _apply(target, operation)
    if "namespace" in settings:
        for target in objects:
            target["metadata"]["namespace"] = settings["namespace"]
    for image in settings.get("images", []):
        for target in objects:
            _retag(target, image)
    for entry in settings.get("replacements", []):
        source = dict(entry["source"])
        path = source.pop("fieldPath")
        (found,) = _selected(objects, source)
        for target in entry["targets"]:
            if target.get("options") != {"create": True}:
                raise NotImplementedError("replacement without create")
            for chosen in _selected(objects, target["select"]):
                for place in target["fieldPaths"]:
                    _replace(chosen, place, found, path)
    return objects


def _selected(objects: list[Object], target: dict[str, str]) -> list[Object]:
    if set(target) - {"kind", "name"}:
        raise NotImplementedError(f"target {target}")
    found = [
        o
        for o in objects
        if o["kind"] == target.get("kind", o["kind"])
        and o["metadata"]["name"] == target.get("name", o["metadata"]["name"])
    ]
    assert found, f"nothing is selected by {target}"
    return found


def _secret(folder: Path, entry: dict[str, Any]) -> Object:
    if set(entry) != {"name", "envs"}:
        raise NotImplementedError(f"secretGenerator {entry}")
    lines = [line for name in entry["envs"] for line in (folder / name).read_text().splitlines()]
    data = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": entry["name"]}, "data": data}


def _apply(target: Any, operation: dict[str, Any]) -> None:
    """One JSON Patch operation (RFC 6902): add, replace or copy."""

    def walk(pointer: str) -> tuple[Any, Any]:
        *parents, last = [p.replace("~1", "/").replace("~0", "~") for p in pointer.split("/")[1:]]
        node = target
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        if isinstance(node, list):
            last = len(node) if last == "-" else int(last)
        return node, last

    node, key = walk(operation["path"])
    kind = operation["op"]
    if kind == "replace":
        node[key]  # it must be there
        node[key] = copy.deepcopy(operation["value"])
        return
    if kind == "copy":
        source, place = walk(operation["from"])
        value = source[place]
    elif kind == "add":
        value = operation["value"]
    else:
        raise NotImplementedError(f"patch operation {kind}")
    if isinstance(node, list):
        node.insert(key, copy.deepcopy(value))
    else:
        node[key] = copy.deepcopy(value)


def _retag(node: Any, image: dict[str, str]) -> None:
    if isinstance(node, list):
        for child in node:
            _retag(child, image)
    elif isinstance(node, dict):
        for key, child in node.items():
            if key in ("containers", "initContainers"):
                for container in child:
                    if container["image"].partition(":")[0] == image["name"]:
                        container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
            else:
                _retag(child, image)


def _replace(target: Any, place: str, source: Any, path: str) -> None:
    for part in path.split("."):
        source = source[part]
    *parents, last = place.split(".")
    for part in parents:
        target = target.setdefault(part, {})
    target[last] = copy.deepcopy(source)
