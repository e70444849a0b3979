"""Generation on a cluster whose processes and nodes are killed: the same command always ends with the same dataset."""

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline.cluster.pool import in_process
from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec
from pipeline.errors import InputError
from pipeline.generation.config import GenerateConfig
from pipeline.models.export import save_model
from pipeline.models.unet import build
from tests.generation.common import config, digests, make, manifest
from tests.jobs.forked import ForkedJob, start_forked
from tests.system.cluster import LocalCluster

pytestmark = pytest.mark.system

SECONDS = 400  # limit of every wait, also beside other load

ACTOR = "_Actor"
COUNT = 200


@pytest.fixture(autouse=True)
def two_nodes(machines: LocalCluster) -> None:
    machines.resize(2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model slow enough to be killed in mid-work: some tenths of a second per file, or more."""
    spec = ModelSpec(
        ModelConfig(model_channels=32, channel_multipliers=(1,), res_blocks=1, class_conditional=True),
        ImageConfig(8, 1, ("a", "b", "c")),
        DiffusionConfig(timesteps=30),
    )
    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("faults") / "model", build(spec).state_dict(), spec)


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    output = tmp_path_factory.mktemp("faults") / "undisturbed"
    make(settings(output), model, in_process)
    torch.set_num_threads(threads)
    return output


def settings(output: Path) -> GenerateConfig:
    """Return the settings that `flags` gives."""
    return config(output, count=COUNT, max_blank_fraction=1.0)


def flags(model: Path, output: Path, count: int = COUNT, most: int = 2) -> list[object]:
    return [
        "--model", model, "--output", output, "--count", count, "--batch-size", 4, "--rows-per-file", 8,
        "--seed", 3, "--guidance", 1.5, "--max-blank-fraction", 1, "--min-actors", 1, "--max-actors", most,
    ]  # fmt: skip


class Driver:
    """A driver process on the cluster that works on an output."""

    def __init__(self, machines: LocalCluster, asked: list[object], output: Path, home: Path) -> None:
        self.output, self.log = output, home / "generate.stderr"
        self.process = start_forked("generate", *asked, home=home, RAY_ADDRESS=machines.address)

    def wait_for_files(self, more: int) -> None:
        """Wait until this many more files are finished."""
        wanted = len(finished(self.output)) + more
        deadline = time.monotonic() + SECONDS
        while len(finished(self.output)) < wanted:
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the process (SIGSTOP): it lives and holds its lock, but does nothing."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()


@pytest.fixture
def drive(machines: LocalCluster, model: Path, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    drivers = list[Driver]()

    def start(output: Path, **sizes: int) -> Driver:
        drivers.append(Driver(machines, flags(model, output, **sizes), output, tmp_path))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()


def finished(output: Path) -> dict[str, int]:
    """Return the files that have a note, and the time of their last write, ns."""
    names = [note.name.removesuffix(".json") for note in output.glob("notes/train-*.json")]
    return {name: (output / "data" / name).stat().st_mtime_ns for name in names}


@pytest.mark.before_kills
def test_the_pool_grows_with_the_cluster_and_goes_on_when_that_shrinks(
    machines: LocalCluster, tmp_path: Path, drive: Callable[..., Driver]
) -> None:
    driver = drive(tmp_path / "samples", count=100 * COUNT, most=3)
    driver.wait_for_files(2)
    assert len(machines.worker_pids(ACTOR)) == 2  # one per CPU
    node = machines.add_node(1)
    deadline = time.monotonic() + SECONDS
    while len(machines.worker_pids(ACTOR)) < 3:
        assert time.monotonic() < deadline, driver.log.read_text()
        time.sleep(1)
    driver.wait_for_files(2)
    machines.kill_node(node)
    driver.wait_for_files(2)
    driver.process.send_signal(signal.SIGTERM)
    assert driver.process.wait(SECONDS) == 128 + signal.SIGTERM, driver.log.read_text()


def test_kills_of_an_actor_a_node_the_driver_and_all_at_once_leave_the_undisturbed_dataset(
    machines: LocalCluster, model: Path, undisturbed: Path, tmp_path: Path, drive: Callable[..., Driver]
) -> None:
    output, moment = tmp_path / "samples", random.Random()
    kept: dict[str, int] = {}

    def after(driver: Driver, files: int) -> None:
        driver.wait_for_files(files)
        time.sleep(moment.uniform(0, 0.4))
        kept.update(finished(output))

    first = drive(output)
    after(first, 2)
    with (
        first.paused(),
        pytest.raises(InputError, match=f"is being written by process {first.process.pid}"),
    ):
        make(settings(output), model, in_process)
    assert machines.kill_workers(ACTOR, 1)
    after(first, 2)
    machines.kill_node(moment.choice(machines.nodes))
    after(first, 2)
    first.kill()
    machines.resize(2)

    both = drive(output)
    after(both, 2)
    both.kill()
    machines.kill_workers(ACTOR)
    machines.resize(0)
    machines.resize(2)

    last = start_forked(
        "generate", *flags(model, output), home=tmp_path, RAY_ADDRESS=machines.address
    ).outcome(SECONDS)
    assert last.code == 0, last.stderr
    assert last.result["count"] == COUNT
    assert len(kept) >= 8
    assert last.result["metrics"]["generated"] <= COUNT - 8 * len(kept)
    assert {name: finished(output)[name] for name in kept} == kept
    assert digests(output) == digests(undisturbed)
    assert manifest(output)["sha256"] == manifest(undisturbed)["sha256"]


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(5))
def test_any_row_of_twenty_faults_leaves_the_undisturbed_dataset(
    machines: LocalCluster,
    model: Path,
    undisturbed: Path,
    tmp_path: Path,
    drive: Callable[..., Driver],
    seed: int,
) -> None:
    output, chance = tmp_path / "samples", random.Random(seed)
    driver = drive(output)
    for _ in range(20):
        time.sleep(chance.uniform(0, 15))
        match chance.choice(("actor", "actors", "node", "driver")):
            case "actor":
                machines.kill_workers(ACTOR, 1)
            case "actors":
                machines.kill_workers(ACTOR)
            case "node":
                machines.kill_node(chance.choice(machines.nodes))
                machines.add_node(1)
            case "driver":
                driver.kill()
                driver = drive(output)
    driver.kill()
    last = start_forked(
        "generate", *flags(model, output), home=tmp_path, RAY_ADDRESS=machines.address
    ).outcome(SECONDS)
    assert last.code == 0, last.stderr
    assert digests(output) == digests(undisturbed)
    assert manifest(output)["sha256"] == manifest(undisturbed)["sha256"]


def test_a_driver_that_plans_a_hundred_million_samples_stays_small(
    machines: LocalCluster, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "samples"
    driver = start_forked(
        "generate", "--model", model, "--output", output, "--count", 100_000_000, "--batch-size", 256,
        "--rows-per-file", 256, "--sampler", "ddim", "--sampling-steps", 1, "--max-blank-fraction", 1,
        home=tmp_path, RAY_ADDRESS=machines.address,
    )  # fmt: skip
    try:
        early = memory(driver, output, files=4)["VmRSS"]
        later = memory(driver, output, files=16)
    finally:
        driver.kill()
        # Its actors may still write for a moment.
        shutil.rmtree(output, ignore_errors=True)
    assert later["VmHWM"] < 500
    assert later["VmRSS"] - early < 20


def memory(driver: ForkedJob, output: Path, files: int) -> dict[str, float]:
    """Wait for this many finished files, and return the driver's Vm* entries of /proc/PID/status in MiB."""
    deadline = time.monotonic() + SECONDS
    while len(list(output.glob("notes/*.json"))) < files:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    lines = Path(f"/proc/{driver.pid}/status").read_text().splitlines()
    return {line.split()[0][:-1]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Vm")}
