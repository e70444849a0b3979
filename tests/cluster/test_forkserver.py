"""A forked worker equals one that Ray starts, and neither it nor its server outlives the raylet."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from pipeline.cluster import forking, forkserver
from pipeline.cluster.ray_internals import WORKER_IMPORTS
from pipeline.commands.cli import training_workers
from pipeline.config import TrainConfig
from tests.cluster.asked import Worker, own_python
from tests.jobs.common import ROOT
from tests.system.cluster import is_alive

DRIVER = """
import time
import ray
from pipeline.cluster.session import connect
from tests.cluster.asked import Worker

connect(preload="ray.data")
worker = Worker.remote()
print(*ray.get(worker.pids.remote()), flush=True)
time.sleep(300)
"""


def command_of(pid: int) -> str:
    return " ".join(psutil.Process(pid).cmdline())


def is_forked(pid: int, parent: int) -> bool:
    return parent == psutil.Process(pid).ppid() and "--serve" in command_of(parent)


def test_a_forked_worker_sees_what_a_started_one_sees(cluster: None) -> None:
    forked, started = Worker.remote(), own_python()
    assert is_forked(*ray.get(forked.pids.remote()))
    assert "raylet" in command_of(ray.get(started.pids.remote())[1])
    assert ray.get(forked.about.remote()) == ray.get(started.about.remote())
    assert "torch" in ray.get(forked.imported.remote())
    assert "torch" not in ray.get(started.imported.remote())


def test_a_forked_worker_has_no_module_of_ray_left_to_import(cluster: None) -> None:
    """Those that Ray imports for a first answer would take each worker up to half a second of a busy core."""
    modules = ray.get(Worker.remote().imported.remote())
    late = modules[max(map(modules.index, WORKER_IMPORTS)) + 1 :]
    assert not [module for module in late if module.startswith(("ray.", "pydantic.", "starlette."))]


def test_no_two_forked_workers_draw_the_same(cluster: None) -> None:
    workers = [Worker.remote() for _ in range(3)]
    for draws in zip(*ray.get([worker.drawn.remote() for worker in workers]), strict=True):
        assert len(set(draws)) == 3


def forks_after(imports: str) -> bool:
    program = (
        f"from pipeline.cluster import forkserver, ray_internals\n{imports}\nprint(forkserver._may_fork())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


def preloaded() -> set[str]:
    """Return the modules that the jobs name for preloading in their workers."""
    files = (ROOT / "pipeline" / "commands").glob("*.py")
    named = {name for file in files for name in re.findall(r'lambda config: "([\w.]+)"', file.read_text())}
    trained = {training_workers(TrainConfig("d", "o", workers=count)) for count in (1, 2)}
    return named | trained


@pytest.mark.slow
def test_what_the_jobs_workers_import_leaves_a_process_that_may_be_forked() -> None:
    """All that any job names, so that its own modules are among those imported."""
    modules = ",".join(
        sorted({name for names in preloaded() for name in names.split(",")} | {*WORKER_IMPORTS})
    )
    assert forks_after(f"with ray_internals.no_random_ids():\n    import {modules}")


def test_the_switch_leaves_each_worker_a_python_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    python = sys.executable
    monkeypatch.setenv(forking.SWITCH, "0")
    assert forking.start_server("json", {}) is None
    with forking.forked_workers("json"):
        assert sys.executable == python


def test_a_process_that_has_drawn_an_id_is_not_forked() -> None:
    """Importing `ray.data` draws an id unless that is prevented."""
    assert not forks_after("import ray.data")


@pytest.fixture(scope="module")
def place(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A runtime environment with variables and a working directory. Its tests share one server of workers."""
    folder = tmp_path_factory.mktemp("place") / "here"
    folder.mkdir()
    (folder / "only_here.py").write_text("")
    packed = f"file://{shutil.make_archive(str(folder), 'zip', folder.parent, 'here')}"
    return {"env_vars": {"PYTHONPATH": "/somewhere", "A": "1"}, "working_dir": packed}


def test_variables_and_a_working_directory_are_there_before_the_imports(place: dict[str, Any]) -> None:
    """Ray copies the directory to the node, and puts the copy first into the worker's search path."""
    forked, started = Worker.options(runtime_env=place).remote(), own_python(place)
    about, expected = ray.get([forked.about.remote(), started.about.remote()])
    assert is_forked(*ray.get(forked.pids.remote()))
    assert about == expected
    assert about["environment"]["A"] == "1"
    assert "/somewhere" in about["sys.path"]
    assert (Path(about["folder"]) / "only_here.py").exists() and str(about["folder"]) in about["sys.path"]


def test_variables_that_ray_expands_are_left_to_it(cluster: None) -> None:
    worker = Worker.options(runtime_env={"env_vars": {"A": "${HOME}/there"}}).remote()
    assert ray.get(worker.about.remote())["environment"]["A"] == f"{os.environ['HOME']}/there"


@pytest.mark.parametrize("place", ["noexec", "long"])
def test_a_temporary_folder_that_is_no_good_is_not_used(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python, folder = sys.executable, tmp_path / ("x" * 90)
    folder.mkdir()
    if place == "noexec":
        monkeypatch.setattr(os, "access", lambda *_: False)
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with forking.forked_workers("ray.data"):
        if place == "noexec":
            assert sys.executable == python
        else:
            assert len(sys.executable) < 80
    assert not list(folder.iterdir())


def test_another_server_takes_the_place_of_one_that_was_killed(place: dict[str, Any]) -> None:
    first, server = ray.get(Worker.options(runtime_env=place).remote().pids.remote())
    os.kill(server, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(server)], timeout=10)
    second, other = ray.get(Worker.options(runtime_env=place).remote().pids.remote(), timeout=60)
    assert is_forked(second, other)
    assert second != first
    assert other != server


@pytest.mark.parametrize(("switch", "forks"), [("0", False), ("1", True)])
def test_it_can_be_switched_off(switch: str, forks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forking.SWITCH, switch)
    python = sys.executable
    with forking.forked_workers("ray.data"):
        assert (sys.executable != python) is forks
    assert sys.executable == python


EARLY = """
import json
import os
import sys
import ray
from pipeline.cluster.session import connect_later, connect_now, disconnect
from tests.cluster.asked import Worker, own_python

connect_later(False, {"A": "1"}, "ray.data")
connect_now()
forked, other, started = Worker.remote(), Worker.remote(), own_python()
pids = [ray.get(worker.pids.remote()) for worker in (forked, other)]
about = [ray.get(worker.about.remote()) for worker in (forked, started)]
raylet = ray.get(started.pids.remote())[1]
print(json.dumps([os.getpid(), pids, *about, raylet, "aiohttp" in sys.modules], default=str), flush=True)
os.kill(raylet, 9)
input()
"""


@pytest.mark.system
def test_a_server_that_a_driver_starts_early_serves_the_raylet_and_ends_with_it() -> None:
    """Its workers equal started ones. All of them end when the raylet is killed, and the driver goes on.

    The driver has not imported what only the raylet's agent needs.
    """
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", EARLY], text=True, **streams) as driver:
        try:
            assert driver.stdout
            pid, pids, forked, started, raylet, has_aiohttp = json.loads(driver.stdout.readline())
            (server,) = {parent for _, parent in pids}
            assert psutil.Process(server).ppid() == pid
            assert forked == started
            assert not has_aiohttp
            deadline = time.monotonic() + 60
            while any(is_alive(one) for one in (server, *(worker for worker, _ in pids))):
                assert time.monotonic() < deadline
                time.sleep(0.2)
            assert driver.poll() is None
            assert not is_alive(raylet)
        finally:
            driver.kill()


def test_a_call_of_a_raylet_that_has_died_becomes_no_server(tmp_path: Path) -> None:
    context = json.dumps({"env_vars": {}, "py_executable": sys.executable})
    call = [
        "setup_worker.py",
        "--language=PYTHON",
        f"--serialized-runtime-env-context={context}",
        "worker.py",
    ]
    done = subprocess.run(
        [sys.executable, "-I", "-S", forkserver.__file__, str(tmp_path), "json", *call],
        env=os.environ | {"RAY_RAYLET_PID": "1"},
        timeout=30,
    )
    assert done.returncode == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("preload", ["no.such.module", "ray.data"])
def test_an_early_server_that_nobody_calls_ends_with_its_driver(preload: str) -> None:
    """A server that can't import its modules ends with its driver too."""
    program = (
        f"import sys\nfrom pipeline.cluster import forking\nforking.start_server({preload!r}, {{}})\ninput()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as driver:
        try:
            deadline = time.monotonic() + 60
            while not (servers := psutil.Process(driver.pid).children()):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            (server,) = servers
            while preload == "no.such.module" and is_alive(server.pid):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            driver.kill()
    while is_alive(server.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.system
def test_workers_and_server_end_with_a_driver_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout
            pids = [int(word) for word in driver.stdout.readline().split()]
            assert len(pids) == 2
            assert all(map(is_alive, pids))
        finally:
            driver.kill()
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
