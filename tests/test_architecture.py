"""Every module has its place in the import contract, imports point one way, and one file imports Ray's private parts."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import pipeline
from pipeline.cluster.ray_internals import INTERNALS
from pipeline.commands.__main__ import JOBS
from tests.jobs.common import ROOT

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
SCRIPT = 'from _launch import launch\n\nif __name__ == "__main__":\n    launch("{}")\n'
# Packages of Ray that are private though their names have no underscore.
PRIVATE = (
    "ray.dashboard",
    "ray.tune.execution",
    "ray.train.v2",
    "ray.autoscaler.v2",
    "ray.core.generated",
    "ray.experimental",
)


def modules() -> set[str]:
    """Names of the modules and packages directly below pipeline/."""
    return {
        path.stem
        for path in (ROOT / "pipeline").iterdir()
        if path.name != "__init__.py" and (path.suffix == ".py" or (path / "__init__.py").exists())
    }


def test_every_module_has_its_place_in_the_contract() -> None:
    layers = next(contract for contract in SETTINGS["contracts"] if contract["type"] == "layers")
    places = [name.strip() for layer in layers["layers"] for name in layer.split("|")]
    assert len(places) == len(set(places))
    assert set(places) == modules()
    assert layers["exhaustive"] and layers["containers"] == ["pipeline"]


def test_a_module_without_a_place_and_an_import_that_runs_up_break_the_contract(tmp_path: Path) -> None:
    """The contract is tried on a small tree with both faults. `make lint` reports them in the real one."""
    for name, content in (("errors", "import pipeline.commands\n"), ("commands", ""), ("homeless", "")):
        folder = tmp_path / "pipeline" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(content)
    (tmp_path / "pipeline" / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text(
        '[tool.importlinter]\nroot_package = "pipeline"\n[[tool.importlinter.contracts]]\nname = "x"\n'
        'type = "layers"\ncontainers = ["pipeline"]\nexhaustive = true\nlayers = ["commands", "errors"]\n'
    )
    linted = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=tmp_path, capture_output=True, text=True
    )  # fmt: skip
    assert linted.returncode == 1
    assert "pipeline.errors -> pipeline.commands" in linted.stdout
    assert "homeless" in linted.stdout


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports. A name of a `from` import comes with its module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_private(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "ray" and (any(p.startswith("_") for p in parts) or name.startswith(PRIVATE))


def test_private_modules_of_ray_are_imported_in_one_place_alone() -> None:
    assert all(is_private(f"{module}.{name}") for name, module in INTERNALS.items())
    files = [
        *(ROOT / "pipeline").rglob("*.py"),
        *(ROOT / "jobs").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
    ]
    found = {path.relative_to(ROOT).as_posix(): [n for n in imports(path) if is_private(n)] for path in files}
    assert {path: names for path, names in found.items() if names} == {}


def test_jobs_only_call_their_commands() -> None:
    scripts = {path.stem: path.read_text() for path in (ROOT / "jobs").glob("[!_]*.py")}
    assert scripts == {job: SCRIPT.format(job) for job in JOBS}
    assert all((ROOT / "pipeline" / "commands" / f"{job}.py").exists() for job in JOBS)


@pytest.mark.parametrize("name", pipeline.__all__)
def test_the_public_names_are_there(name: str) -> None:
    assert getattr(pipeline, name) is not None


def test_the_public_names_are_imported_when_they_are_asked_for() -> None:
    asked = (
        "import sys, pipeline; pipeline.TrainConfig; loaded = {'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules);"
        "assert not loaded, loaded; assert 'train' in dir(pipeline); pipeline.load_model; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", asked], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pipeline.nothing


LIGHT = {
    "pipeline.commands.train": ("mlflow", "torch", "ray"),
    "pipeline.commands.tune": ("mlflow", "torch", "ray"),
    "pipeline.commands.generate": ("mlflow", "torch", "ray"),
    "pipeline.commands.evaluate": ("mlflow", "torch", "ray"),
    "pipeline.commands.plot": ("mlflow", "torch", "ray"),
    "pipeline.commands.export": ("mlflow", "torch", "ray"),
    "pipeline.commands.submit": ("mlflow", "torch", "ray"),
    "pipeline.commands.prepare": ("mlflow", "torch"),
    "pipeline.data.stream": ("mlflow", "torch"),  # Ray Train's actor that hands out the streams
    "pipeline.training.worker": ("mlflow",),
}


@pytest.fixture(scope="module")
def heavy() -> dict[str, list[str]]:
    """What is imported of MLflow, torch and Ray, as a list of names after the import of each module of LIGHT.

    One process imports them one after the other, those that may import least first. So a module is blamed for what
    it imports itself, unless one before it did and is blamed for it.
    """
    wanted = [set(names) for names in LIGHT.values()]
    assert all(later <= earlier for earlier, later in pairwise(wanted))
    ask = (
        f"import importlib, json, sys\nfound = {{}}\nfor module in {[*LIGHT]!r}:\n importlib.import_module(module)\n"
        " found[module] = [name for name in ('mlflow', 'torch', 'ray') if name in sys.modules]\nprint(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("module", LIGHT)
def test_a_process_does_not_import_what_it_does_not_use(heavy: dict[str, list[str]], module: str) -> None:
    """MLflow and torch take seconds each to import, before a bad flag is refused and in every process of a job."""
    assert not set(heavy[module]) & set(LIGHT[module])
