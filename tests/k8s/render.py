"""Render kustomizations by kubectl, as `kubectl apply -k` would send them."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"


def render(folder: Path) -> list[Object]:
    """All objects of a kustomization; skips the test where neither kubectl nor kustomize is installed."""
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    elif shutil.which("kustomize"):
        command = ["kustomize", "build"]
    else:
        pytest.skip("neither kubectl nor kustomize is on PATH")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))
