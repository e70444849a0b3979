"""Two clusters shared by all modules here, each started once. A test that kills a node adds a new one."""

import contextlib
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.data.common import leave_ray
from tests.jobs.common import Outcome
from tests.system.cluster import LocalCluster, local_cluster
from tests.system.served import DATA, PREPARE, RUN, SMALL, Served, served_cluster, wait_for

RUNNING = {"machines": contextlib.ExitStack(), "served": contextlib.ExitStack()}


@pytest.fixture(scope="session")
def machines() -> Iterator[LocalCluster]:
    """A cluster whose nodes can be killed. `resize` sets their number."""
    leave_ray()
    with RUNNING["machines"] as stack:
        yield stack.enter_context(local_cluster())


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """A cluster of two nodes for submitted jobs, with MLflow and S3 beside it."""
    leave_ray()
    with RUNNING["served"] as stack:
        yield stack.enter_context(served_cluster())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> Iterator[None]:
    """End a cluster that the next test doesn't use. Its idle processes would take a tenth of a core from the others."""
    yield
    for name, stack in RUNNING.items():
        if name not in getattr(nextitem, "fixturenames", ()):
            stack.close()


@pytest.fixture(scope="session")
def prepared(served: Served) -> Outcome:
    """The outcome of the job "digits", which prepared digits on S3."""
    return served.submit("--wait", "--id", "digits", *PREPARE)


@dataclass(frozen=True)
class Trained:
    """A training run of one worker that lost its driver, and was submitted again with two workers.

    Attributes:
        result: the result of the second job, "run". The first job is "killed".
        before: steps of the checkpoints when the driver had died.
        after: steps of the checkpoints at the end.
    """

    result: dict[str, Any]
    before: list[int]
    after: list[int]


STEPS, CHECKPOINT_EVERY = 160, 20


@pytest.fixture(scope="session")
def trained(served: Served, prepared: Outcome) -> Trained:
    words = (
        "train", "--", "--data", DATA, "--output", RUN, "--steps", STEPS, "--batch-size", 32,
        "--timesteps", 50, "--class-conditional", *SMALL, "--checkpoint-every", CHECKPOINT_EVERY,
        "--keep-checkpoints", STEPS // CHECKPOINT_EVERY, "--log-every", 20, "--register", "digits", "--resume",
    )  # fmt: skip
    assert prepared.code == 0, prepared.stderr
    job = served.start_submit("--wait", "--id", "killed", *words, "--workers", 1)

    def saved() -> list[int]:
        found = (re.fullmatch(r".*/step-(\d+)-\d+/state\.json", key) for key in served.keys("runs/digits/"))
        return [int(match[1]) for match in found if match]

    def wait_for_more(than: int) -> None:
        wait_for("a checkpoint", lambda: len(saved()) > than or job.poll() is not None, seconds=240)
        assert job.poll() is None, job.communicate()

    wait_for_more(1)
    drivers = served.driver("--output", RUN)
    assert drivers
    for process in drivers:
        process.send_signal(signal.SIGKILL)
    _, stderr = job.communicate(timeout=240)
    assert job.returncode not in (0, 2), stderr
    before = saved()
    done = served.submit("--wait", "--id", "run", *words, "--workers", 2, timeout=400)
    assert done.code == 0, done.stderr
    assert "Traceback" not in done.stderr
    return Trained(done.result, before, saved())
