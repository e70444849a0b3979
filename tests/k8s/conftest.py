import shutil
from pathlib import Path

import pytest

from tests.k8s.render import K8S, Object, render


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """The Secrets that k8s/secrets makes once every example is filled in."""
    folder: Path = tmp_path_factory.mktemp("k8s") / "secrets"
    shutil.copytree(K8S / "secrets", folder, ignore=shutil.ignore_patterns("*.env"))
    for example in folder.glob("*.env.example"):
        filled = "\n".join(
            f"{line}planted" if line.endswith("=") else line for line in example.read_text().splitlines()
        )
        example.with_suffix("").write_text(filled)
    return render(folder)


@pytest.fixture(scope="session", params=["local", "gpu"])
def overlay(request: pytest.FixtureRequest) -> str:
    return request.param


_RENDERED: dict[str, list[Object]] = {}


@pytest.fixture
def standing(overlay: str) -> list[Object]:
    """The standing part of an overlay."""
    return _render(overlay)


@pytest.fixture
def jobs(overlay: str) -> list[Object]:
    """The jobs of an overlay."""
    return _render(f"{overlay}/jobs")


def _render(name: str) -> list[Object]:
    if name not in _RENDERED:
        _RENDERED[name] = render(K8S / "overlays" / name)
    return _RENDERED[name]
