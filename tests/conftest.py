"""Fixtures that many tests share: a local Ray, an S3 server, an MLflow server, prepared digits.

Tests are sorted so that each is started once: first the tests without a cluster, then those on the one local Ray of
this process, then those that start clusters and jobs of their own.
"""

import faulthandler
import gc
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.data.weather import Weather
from tests.jobs.common import OF_TRAINING, Outcome, database, outcome_of

# One thread per process: two tests, or a test and its jobs, share two cores, and no computation here needs more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Many nodes share this machine and nobody reads their metrics, whose collection would take a tenth of it.
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "60")
# Below this number of files Ray ignores the interval and looks for new logs ten times a second.
os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "1")
# No usage statistics: the tests' nodes shouldn't be counted, and Ray Data then starts no process for it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# After this long others get the room that Ray Data reserved for a driver that was killed.
os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
# Nodes die without notice here, so training needs no process that watches for preemption notices. Submitted jobs
# do have that process: their nodes get none of these variables (tests/system/served.py).
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.update(OF_TRAINING)
# Without a GPU Triton interprets its kernels (tests/gpu). Triton reads this variable on import.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    """On SIGUSR1 print every thread's stack to the real stderr, which pytest doesn't capture (tests/__main__.py)."""
    faulthandler.register(signal.SIGUSR1, os.fdopen(os.dup(2), "w"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a shared cluster, and sort all tests so that each cluster is started once."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "cluster" in fixtures and not item.get_closest_marker("system"):
            item.add_marker("cluster")
        for name in ("machines", "served"):
            if name in fixtures:
                item.add_marker(name)
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    if not item.get_closest_marker("system"):
        return 1 if item.get_closest_marker("cluster") else 0
    # Users of one cluster come one after the other, so that it can end after the last (tests/system/conftest.py).
    fixtures = getattr(item, "fixturenames", ())
    if "machines" in fixtures:
        return 2 if item.get_closest_marker("before_kills") else 3
    return 4 if "served" in fixtures else 5


def pytest_collection_finish() -> None:
    """Leave what was imported out of later searches for garbage, which would take a twentieth of the tests' time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_ray_unasked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that starts Ray without a marker for it. The tests after it would pay for that Ray."""

    def running() -> bool:
        return "ray" in sys.modules and sys.modules["ray"].is_initialized()

    before = running()
    yield
    asked = any(request.node.get_closest_marker(name) for name in ("cluster", "system"))
    if not before and not asked and running():
        sys.modules["ray"].shutdown()
        pytest.fail("starts Ray: use the fixture `cluster`")


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URI of a bucket on a local S3 server. The environment points every process started from now on to it."""
    from tests.data.s3 import s3_server

    with s3_server("tests") as uri:
        yield uri


@pytest.fixture
def bucket(s3: str) -> str:
    """URI of an empty folder in that bucket."""
    return f"{s3}/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def weather(s3: str) -> Iterator[Weather]:
    """The proxy before the S3 server, which can make requests fail. It is calm again after the test."""
    from tests.data.s3 import weather

    yield weather[-1]
    weather[-1].calm()


@pytest.fixture(scope="session")
def mlflow_weather(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weather]:
    """The proxy before an MLflow server, which can make requests fail."""
    from tests.tracking.server import mlflow_server

    with mlflow_server(tmp_path_factory.mktemp("mlflow-server")) as port:
        weather = Weather("127.0.0.1", port)
        yield weather
        weather.stop()


@pytest.fixture
def mlflow(mlflow_weather: Weather, monkeypatch: pytest.MonkeyPatch) -> Iterator[Weather]:
    """The same proxy, with MLFLOW_TRACKING_URI pointing to it. It is calm again after the test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_weather.address)
    yield mlflow_weather
    mlflow_weather.calm()


@pytest.fixture(scope="session")
def cluster(s3: str) -> Iterator[None]:
    """The one local Ray of this process. Its workers reach the S3 server. Call `leave_ray` to start another Ray."""
    from pipeline.cluster.session import connect
    from tests.data.common import leave_ray

    connect(preload="pipeline.training.worker")
    yield
    leave_ray()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real handwritten digits as prepared shards: 1620 for training, 177 held out. Tests must not change them."""
    return _digits(tmp_path_factory.mktemp("digits"), held_out=0.098)


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 540 for training, for runs whose steps should be short."""
    return _digits(tmp_path_factory.mktemp("few-digits"), held_out=0.71484375)


def _digits(folder: Path, held_out: float) -> Path:
    from pipeline.data import shards

    with pytest.MonkeyPatch.context() as patch:
        _prepare_here(patch)
        shards.prepare(
            shards.PrepareConfig(output=str(folder), source="digits", validation_fraction=held_out)
        )
    return folder


@pytest.fixture
def prepared_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` decodes in this process. Other tests show that a pool of actors gives the same shards."""
    _prepare_here(monkeypatch)


def _prepare_here(patch: pytest.MonkeyPatch) -> None:
    from pipeline.cluster.pool import in_process
    from pipeline.data import shards

    patch.setattr(shards, "ActorPool", lambda *_, **__: in_process)


@pytest.fixture
def job(
    cluster: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Like `run_job`, but in this process and on its Ray, for tests that gain nothing from a process of their own."""
    from pipeline.commands import __main__, cli

    def run(name: str, *flags: object, home: Path) -> Outcome:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", database(home))
        monkeypatch.chdir(home)
        monkeypatch.setattr(cli, "disconnect", lambda: None)
        capfd.readouterr()
        code = __main__.main([name, *map(str, flags)])
        return outcome_of(code, *capfd.readouterr())

    return run
