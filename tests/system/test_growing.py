"""Each job asks the autoscaler for the nodes that it needs, and withdraws the request at its end."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.generation.common import save
from tests.system.growing import IDLE_SECONDS, MOST_NODES, Growing, growing_cluster
from tests.system.served import SMALL, wait_for

pytestmark = pytest.mark.system
SECONDS = 400
SPACE = """
batch_size: 32
model.model_channels: 32
model.channel_multipliers: [[1]]
model.res_blocks: 1
diffusion.timesteps: 20
diffusion.schedule: [cosine, linear]
"""


@pytest.fixture(scope="module")
def growing() -> Iterator[Growing]:
    with growing_cluster() as cluster:
        yield cluster


def is_quiet(cluster: Growing) -> bool:
    return not cluster.requested() and not cluster.gpu_nodes()


def test_jobs_grow_the_cluster_from_its_head_alone(growing: Growing, digits: Path, tmp_path: Path) -> None:
    assert growing.gpu_nodes() == set()
    data = ("--data", digits)
    # The job needs more than any node can have.
    large = growing.start(
        tmp_path / "large", "train", *data, "--output", "large", "--gpu", "True", "--cpus-per-worker", 4
    ).outcome(SECONDS)
    assert large.code == 2
    assert large.stderr.splitlines()[-1] == (
        "train: --workers 1 --cpus-per-worker 4 --gpu: no node of the cluster has 4 CPUs and 1 GPU, "
        "and its autoscaler has no larger one"
    )
    assert growing.requested() == [] and growing.gpu_nodes() == set()

    # All jobs run at once, so each one's request must be added to the others'.
    (tmp_path / "space.yaml").write_text(SPACE)
    model = save(tmp_path / "model")
    small = ("--steps", 4, "--batch-size", 32, "--timesteps", 20, *SMALL)
    jobs = {
        # Without --gpu the job chooses GPUs, since the autoscaler can add them.
        "train": growing.start(tmp_path / "train", "train", *data, "--output", "run", *small),
        "tune": growing.start(
            tmp_path / "tune", "tune", *data, "--output", "search", "--trials", 2, "--images", 512, "--rungs", 1,
            "--space", tmp_path / "space.yaml", "--terms", 2, "--max-images", 8, "--register", "",
        ),
        "generate": growing.start(
            tmp_path / "generate", "generate", "--model", model, "--output", "samples", "--count", 8, "--batch-size", 4,
            "--rows-per-file", 4, "--sampler", "ddim", "--sampling-steps", 2, "--gpu", "--actors", 1,
        ),
    }  # fmt: skip
    done = {name: job.outcome(SECONDS) for name, job in jobs.items()}
    for name, job in done.items():
        assert job.code == 0, f"{name}: {job.stderr}"
    assert done["generate"].result["count"] == 8
    assert done["tune"].result["count"] == 2
    placed = growing.placed()
    assert {place["job"] for place in placed} == {"train", "generate"}
    # One file per training worker (of the run and of each trial), and one of the sampler.
    assert len(placed) >= 4 and all(len(place["gpus"]) == 1 for place in placed)
    assert 2 <= len({place["node"] for place in placed}) <= MOST_NODES

    # No request is left, so the autoscaler removes the nodes.
    wait_for("the head alone", lambda: is_quiet(growing), IDLE_SECONDS + 60, [growing.head])


def test_a_job_that_is_ended_while_it_waits_withdraws_its_request(
    growing: Growing, digits: Path, tmp_path: Path
) -> None:
    job = growing.start(
        tmp_path,
        "train",
        "--data",
        digits,
        "--output",
        "run",
        "--workers",
        MOST_NODES,
        "--gpu",
        "True",
        *SMALL,
    )
    wait_for("the request", lambda: bool(growing.requested()), needed=[growing.head])
    job.send_signal(signal.SIGTERM)
    ended = job.outcome(SECONDS)
    assert ended.code == 128 + signal.SIGTERM
    assert ended.stderr.splitlines()[-1] == "train: ended by SIGTERM"
    time.sleep(1)
    assert growing.requested() == []
