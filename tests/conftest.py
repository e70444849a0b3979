"""What many tests need once: a Ray, an S3 server, prepared digits, a cluster of several nodes, a served one.

The order of the tests makes it cheap: those without any cluster first, then those on one local Ray of this process,
then those that start clusters and jobs of their own.
"""

import faulthandler
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.data.weather import Weather
from tests.jobs.common import Outcome, database, outcome_of

# A thread each: two tests, or a test and its jobs, share two cores, and nothing here is large enough for more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Many nodes share this machine, and nobody looks at their figures: what watches them would take a tenth of it.
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "60")
# Below so many files the interval does not count, and Ray looks for new logs ten times a second.
os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "1")
# Nodes that tests start are not counted anywhere, and Ray Data needs no process for it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Nodes go without notice here, and a training needs no process that looks out for one. Submitted jobs have it: their
# nodes are given none of these variables (tests/system/served.py).
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# Nor are there programs enough to compile that headers would be worth it.
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
# Without a GPU Triton's kernels are interpreted (tests/gpu); Triton looks at this when it is imported.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    """SIGUSR1 shows what every thread does, past what captures the output: see tests/__main__.py."""
    faulthandler.register(signal.SIGUSR1, os.fdopen(os.dup(2), "w"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that use a cluster that is shared, and orders all so that each is started once."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "cluster" in fixtures and not item.get_closest_marker("system"):
            item.add_marker("cluster")
        if "served" in fixtures:
            item.add_marker("served")
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    return 2 if item.get_closest_marker("system") else 1 if item.get_closest_marker("cluster") else 0


@pytest.fixture(autouse=True)
def no_ray_unasked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that starts Ray without saying so: it would cost whatever runs after it."""

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
    """A bucket of an S3 server on this machine, which every process started from now on reaches."""
    from tests.data.s3 import s3_server

    with s3_server("tests") as uri:
        yield uri


@pytest.fixture
def bucket(s3: str) -> str:
    """An empty folder in that bucket."""
    return f"{s3}/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def weather(s3: str) -> Iterator[Weather]:
    """What happens to the requests that the S3 server gets; nothing any more after the test."""
    from tests.data.s3 import weather

    yield weather[-1]
    weather[-1].calm()


@pytest.fixture(scope="session")
def mlflow_weather(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weather]:
    """What happens to the requests that a server of MLflow gets."""
    from tests.tracking.server import mlflow_server

    with mlflow_server(tmp_path_factory.mktemp("mlflow-server")) as port:
        weather = Weather("127.0.0.1", port)
        yield weather
        weather.stop()


@pytest.fixture
def mlflow(mlflow_weather: Weather, monkeypatch: pytest.MonkeyPatch) -> Iterator[Weather]:
    """The weather before the server that MLFLOW_TRACKING_URI names; calm again after the test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_weather.address)
    yield mlflow_weather
    mlflow_weather.calm()


@pytest.fixture(scope="session")
def cluster(s3: str) -> Iterator[None]:
    """The one local Ray of this process; its workers reach the S3 server. `leave_ray` makes room for another."""
    from pipeline.cluster.session import connect
    from tests.data.common import leave_ray

    connect(preload="pipeline.training.worker")
    yield
    leave_ray()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real handwritten digits as prepared shards: 1620 to train on, 177 held out; not to be changed."""
    from pipeline.data import shards

    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        _prepare_here(patch)
        # Of the 1797, so many as make 18 batches of 90.
        shards.prepare(shards.PrepareConfig(output=str(folder), source="digits", validation_fraction=0.098))
    return folder


@pytest.fixture
def prepared_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` decodes in this process: some tests show that a pool of actors makes the same of it."""
    _prepare_here(monkeypatch)


def _prepare_here(patch: pytest.MonkeyPatch) -> None:
    from pipeline.cluster.pool import in_process
    from pipeline.data import shards

    patch.setattr(shards, "ActorPool", lambda *_, **__: in_process)


@pytest.fixture
def job(
    cluster: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """As `run_job`, in this process and on its Ray: for what a process of its own would prove nothing more of."""
    from pipeline.commands import __main__, cli

    def run(name: str, *flags: object, home: Path) -> Outcome:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", database(home))
        monkeypatch.chdir(home)
        monkeypatch.setattr(cli, "disconnect", lambda: None)
        capfd.readouterr()
        code = __main__.main([name, *map(str, flags)])
        return outcome_of(code, *capfd.readouterr())

    return run
