"""Training on a cluster whose workers, nodes and driver are killed gives the run that nothing disturbs."""

import dataclasses
import functools
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
import torch

from pipeline import storage
from pipeline.commands import cli
from pipeline.config import TrainConfig
from pipeline.data.index import open_splits
from pipeline.data.order import batch_rows
from pipeline.training import checkpoint
from pipeline.training.meter import samples_digest
from tests.jobs.common import environment
from tests.jobs.forked import ForkedJob
from tests.system.cluster import LocalCluster
from tests.training.digit_runs import ROWS
from tests.training.runs import Undisturbed, undisturbed
from tests.training.test_loop import epochs_digest

pytestmark = pytest.mark.system

BATCH, STEPS, SECONDS = 60, 108, 300
EPOCHS = STEPS * BATCH // ROWS
FLAGS = (
    "--batch-size", BATCH, "--log-every", 6, "--checkpoint-every", 6,
    "--model-channels", 32, "--channel-multipliers", 1, "--res-blocks", 1, "--attention-resolutions", 4,
    "--timesteps", 20, "--timestep-sampler", "loss_second_moment", "--precision", "fp32", "--resize-seconds", 2,
    "--readers", 1,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Site:
    """A cluster, and a folder with data, MLflow's database and runs."""

    home: Path
    cluster: LocalCluster

    def start(self, output: str, steps: int, *flags: object) -> ForkedJob:
        """Start a training job in the background."""
        everything = ("--data", "digits", "--output", output, "--steps", steps, *FLAGS, *flags)
        variables = environment(self.home, RAY_ADDRESS=self.cluster.address)
        log = self.home / f"{output}.log"
        return ForkedJob("train", *everything, cwd=self.home, variables=variables, stdout=log, stderr=log)

    def log(self, output: str) -> str:
        return (self.home / f"{output}.log").read_text()

    def checkpoints(self, output: str) -> list[str]:
        return checkpoint.complete(str(self.home / output / "checkpoints"))

    def step(self, output: str) -> int:
        """Return the step of the newest whole checkpoint, or 0."""
        found = self.checkpoints(output)
        return int(storage.name(found[0]).split("-")[1]) if found else 0

    def wait(self, what: str, condition: Callable[[], bool], job: ForkedJob | None = None) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert job is None or job.poll() is None, f"the job ended before {what}: exit code {job.poll()}"
            assert time.monotonic() < end, f"waited in vain for {what}"
            time.sleep(1.0)

    @functools.cached_property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.home / 'mlflow.db'}")

    def runs(self, output: str) -> list[mlflow.entities.Run]:
        wanted = f"tags.`ray_ddpm.output` = '{self.home / output}'"
        return list(self.client.search_runs(["1"], filter_string=wanted))

    def curve(self, output: str, name: str) -> list[tuple[int, float]]:
        """Return all points of a curve of the output's only run, as (step, value)."""
        (run,) = self.runs(output)
        history = self.client.get_metric_history(run.info.run_id, name)
        return sorted((point.step, point.value) for point in history)


@pytest.fixture(scope="module")
def site(few_digits: Path, machines: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    home = tmp_path_factory.mktemp("faults")
    (home / "digits").symlink_to(few_digits)
    return Site(home, machines)


@pytest.fixture
def jobs() -> Iterator[list[ForkedJob]]:
    """A list of started jobs. Those that still run after the test are killed."""
    started: list[ForkedJob] = []
    yield started
    for job in started:
        job.kill()


@pytest.fixture(scope="session")
def reference(few_digits: Path) -> Undisturbed:
    """The result of a run that nothing disturbs."""
    words = ("--data", few_digits, "--output", "unused", "--steps", STEPS, *FLAGS)
    return undisturbed(cli.parse(TrainConfig, list(map(str, words)), "train", ""))


def assert_curve(site: Site, output: str, steps: int, reference: Undisturbed) -> None:
    """Check that there is one MLflow run, with the reference's curve."""
    curve, theirs = site.curve(output, "loss"), reference.losses
    assert [step for step, _ in curve] == list(range(6, steps + 1, 6))
    common = [(loss, theirs[step]) for step, loss in curve if step in theirs]
    assert len(common) == min(steps, STEPS) // 6
    assert [mine for mine, _ in common] == pytest.approx([loss for _, loss in common], rel=1e-3)


def assert_whole(site: Site, output: str, reference: Undisturbed) -> None:
    """Check that there is one finished MLflow run with the reference's curve, and each epoch had each sample once."""
    assert_curve(site, output, STEPS, reference)
    # The digest travels from checkpoint to checkpoint, so it covers the steps that survived.
    saved, state = checkpoint.read(site.checkpoints(output)[0])
    assert saved.step == STEPS
    seen = {"samples": EPOCHS * ROWS, "digest": epochs_digest(EPOCHS, ROWS), "undecodable": 0}
    assert state["seen"] == seen
    assert site.runs(output)[0].info.status == "FINISHED"


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.before_kills
def test_elastic_training_follows_its_nodes_and_sigterm_saves(
    site: Site, reference: Undisturbed, jobs: list[ForkedJob]
) -> None:
    output = "elastic"
    site.cluster.resize(1)

    def workers() -> list[float]:
        return [count for _, count in site.curve(output, "workers")] if site.runs(output) else []

    # Few checkpoints are due, so a resize that did not save first would make most steps again.
    rare = ("--checkpoint-every", 600)
    jobs.append(site.start(output, 100_000, "--workers", 2, "--min-workers", 1, *rare))
    site.wait("steps of one worker", lambda: 1.0 in workers(), jobs[0])
    joined = site.cluster.add_node(1)
    site.wait("steps of two workers", lambda: 2.0 in workers(), jobs[0])
    alone = [step for step, count in site.curve(output, "workers") if count == 1.0]
    resized = re.search(r"the workers were restarted: 2 continue from step (\d+)", site.log(output))
    assert resized and int(resized[1]) >= alone[-1]
    site.cluster.kill_node(joined)
    site.wait("steps of one worker again", lambda: workers()[-1] == 1.0, jobs[0])
    jobs[0].send_signal(signal.SIGTERM)
    assert jobs[0].wait(timeout=SECONDS) == 128 + signal.SIGTERM
    stopped = site.step(output)
    assert f"stopped at step {stopped} of 100000, which is saved" in site.log(output)
    assert site.runs(output)[0].info.status == "KILLED"
    assert_curve(site, output, stopped, reference)
    # That a resume continues from such a checkpoint is shown below, with a driver that was killed.
    plan = open_splits(str(site.home / "digits"))["train"].plan(TrainConfig.seed, BATCH)
    rows = batch_rows(plan, 0, stopped)
    digest = samples_digest(rows.epoch.ravel(), plan.ids(rows).ravel())
    seen = {"samples": stopped * BATCH, "digest": f"{digest:016x}", "undecodable": 0}
    assert checkpoint.read(site.checkpoints(output)[0])[1]["seen"] == seen


def test_a_killed_worker_node_and_driver_and_a_cut_checkpoint_leave_no_trace(
    site: Site, reference: Undisturbed, jobs: list[ForkedJob]
) -> None:
    output = "killed"
    site.cluster.resize(3)
    jobs.append(site.start(output, STEPS, "--workers", 2))
    site.wait("the first checkpoint", lambda: site.step(output) >= 6, jobs[0])
    assert site.cluster.kill_workers("RayTrainWorker", 1)
    site.wait("a checkpoint after the worker's death", lambda: site.step(output) >= 24, jobs[0])
    site.cluster.kill_node(site.cluster.nodes[0])
    site.wait("a checkpoint after the node's death", lambda: site.step(output) >= 42, jobs[0])
    jobs[0].send_signal(signal.SIGKILL)
    jobs[0].wait()
    newest = Path(site.checkpoints(output)[0])
    file = newest / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    # An unfinished checkpoint, as a killed driver leaves it.
    (newest.parent / checkpoint.new_name(site.step(output) + 1)).mkdir()
    jobs.append(site.start(output, STEPS, "--workers", 2, "--resume"))
    assert jobs[1].wait(timeout=SECONDS) == 0, site.log(output)
    assert f"checkpoint passed over: {newest.name}: weights.safetensors is damaged" in site.log(output)
    assert "Traceback" not in site.log(output)
    assert_whole(site, output, reference)
    mine = flat(checkpoint.read(site.checkpoints(output)[0])[0].weights)
    theirs = flat(reference.end.weights)
    assert (mine - theirs).norm() < 1e-3 * theirs.norm()
    assert len(storage.list_folders(str(site.home / output / "checkpoints"), "step-")) == 3


@pytest.mark.soak
@pytest.mark.parametrize("second", ["worker", "workers", "node", "driver"])
@pytest.mark.parametrize("first", ["worker", "workers", "node", "driver"])
def test_every_fault_may_follow_every_other_before_the_run_has_recovered(
    site: Site, reference: Undisturbed, jobs: list[ForkedJob], first: str, second: str
) -> None:
    output, flags = f"{first}-{second}", ("--workers", 2, "--resume")
    site.cluster.resize(3)

    def break_a(kind: str) -> None:
        if kind == "driver":
            jobs[-1].kill()
            jobs.append(site.start(output, STEPS, *flags))
        elif kind == "node":
            site.cluster.kill_node(site.cluster.nodes[0])
            site.cluster.add_node(1)
        else:
            site.cluster.kill_workers("RayTrainWorker", 1 if kind == "worker" else None)

    jobs.append(site.start(output, STEPS, *flags))
    site.wait("the first checkpoint", lambda: site.step(output) >= 6, jobs[-1])
    break_a(first)
    time.sleep(random.Random(output).uniform(0, 10))
    break_a(second)
    assert jobs[-1].wait(timeout=SECONDS) == 0, site.log(output)
    assert_whole(site, output, reference)
