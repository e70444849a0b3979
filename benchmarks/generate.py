"""Compares generated images/s with the necessary forward passes, with diffusers, and between one actor and two.

    python -m benchmarks.generate [--smoke]

Draws 32x32x3 images by 10 steps of DDIM on one thread. Three sides take turns in this process: the sampler as in an actor
(noise, network, PNG, Parquet file, note), bare forward passes, and diffusers' DDIMPipeline with a UNet2DModel of the
same structure. Their rates are images per second of CPU time, which other work on the machine does not change. Then the
job's actor pool on Ray is timed by the clock, from its first file to its last.

    of_forward          sampler over forward passes: 1 is the limit
    to_diffusers        sampler over diffusers
    pool_of_forward     one actor by the clock over forward passes by the clock
    two_actors_to_one   two actors over one, by the clock
    two_forwards_to_one the machine's own limit: bare forward passes in two processes at once over those in one
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

# One thread. Must be set before torch and Ray are imported.
os.environ["OMP_NUM_THREADS"] = "1"

import ray
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from benchmarks.common import two_over_one
from pipeline.cluster.pool import MOST_BLOCKS
from pipeline.cluster.session import connect
from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec, Precision, TrainConfig
from pipeline.generation.chunks import Chunk, tasks
from pipeline.generation.config import GenerateConfig
from pipeline.generation.job import actor_pool
from pipeline.generation.sampler import SampleWork, Setup
from pipeline.models.diffusers import unet_config
from pipeline.models.export import load_model, pack_model, save_model
from pipeline.models.unet import build
from pipeline.training.network import uses_bf16

SPEC = ModelSpec(ModelConfig(), ImageConfig(32, 3), DiffusionConfig())


class Work(NamedTuple):
    """Images per batch, steps of the sampler, and number of timed batches."""

    batch: int
    steps: int
    rounds: int


def forward_side(folder: Path, work: Work, precision: Precision) -> Callable[[], object]:
    """The bare forward passes of the network."""
    model, _ = load_model(folder)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(work.batch, 3, 32, 32).to(memory_format=torch.channels_last)
    t = torch.randint(0, 1000, (work.batch,))

    def side() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for _ in range(work.steps):
                model(x, t)

    return side


def diffusers_side(work: Work, precision: Precision) -> Callable[[], object]:
    """Diffusers' pipeline. Uses autocast for bf16, because diffusers can't convert a bf16 image to an array."""
    pipe = DDIMPipeline(UNet2DModel.from_config(unet_config(SPEC)).eval(), DDIMScheduler(1000))
    pipe.set_progress_bar_config(disable=True)

    def side() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            pipe(work.batch, num_inference_steps=work.steps)

    return side


def sampler_side(folder: Path, work: Work, precision: Precision, output: Path) -> Callable[[], object]:
    """The work of an actor for a file of one batch."""
    sampler = SampleWork(setup(folder, work, precision, output, actors=1)).start("cpu")
    starts = count(0, work.batch)

    def side() -> None:
        start = next(starts)
        sampler(Chunk(start, start + work.batch))

    return side


def setup(folder: Path, work: Work, precision: Precision, output: Path, actors: int) -> Setup:
    """The setup of a job that writes files of one batch each."""
    config = GenerateConfig(
        "", str(output), count=(work.rounds + 1) * actors * work.batch, batch_size=work.batch,
        rows_per_file=work.batch, sampler="ddim", sampling_steps=work.steps, actors=actors, precision=precision,
    )  # fmt: skip
    return Setup(pack_model(folder), config, str(output), "")


def take_turns(sides: dict[str, Callable[[], object]], work: Work) -> dict[str, tuple[float, float]]:
    """Images per CPU second and per second of the clock for each side, medians over the rounds."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for name in list(sides) * (work.rounds + 1):
        cpu, clock = time.process_time(), time.perf_counter()
        sides[name]()
        times[name].append((time.process_time() - cpu, time.perf_counter() - clock))
    # The first round warms up.
    return {
        name: tuple(work.batch / statistics.median(column) for column in zip(*values[1:], strict=True))
        for name, values in times.items()
    }


def pool_rate(folder: Path, work: Work, precision: Precision, output: Path, actors: int) -> float:
    """Images/s of the actor pool, without its start."""
    given = setup(folder, work, precision, output, actors)
    spans = tasks([Chunk(0, given.config.count)], work.batch, MOST_BLOCKS)
    done = [time.perf_counter() for _ in actor_pool(given.config)(SampleWork(given), spans)]
    return work.batch * work.rounds * actors / (done[-1] - done[actors - 1])


def forward_rate(folder: Path, work: Work, precision: Precision) -> float:
    """Images/s of bare forward passes on one thread."""
    torch.set_num_threads(1)
    side, began = forward_side(folder, work, precision), time.perf_counter()
    for _ in range(work.rounds):
        side()
    return work.batch * work.rounds / (time.perf_counter() - began)


def main(smoke: bool) -> None:
    """Prints one JSON line."""
    work = Work(2, 2, 1) if smoke else Work(16, 10, 4)
    torch.set_num_threads(1)
    connect(preload="pipeline.generation.sampler")
    result: dict[str, float] = {}
    # bf16 only if the CPU supports it, because emulated bf16 is slow.
    bf16 = not smoke and uses_bf16(TrainConfig("", ""), torch.device("cpu"))
    precisions: list[Precision] = ["fp32", "bf16"] if bf16 else ["fp32"]
    for precision in precisions:
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            folder = save_model(home / "model", build(SPEC).state_dict(), SPEC)
            sides = {
                "sampler": sampler_side(folder, work, precision, home / "sampler"),
                "forward": forward_side(folder, work, precision),
                "diffusers": diffusers_side(work, precision),
            }
            rates = take_turns(sides, work)
            one, two = (
                pool_rate(folder, work, precision, home / f"pool-{actors}", actors) for actors in (1, 2)
            )
            limit = two_over_one(forward_rate, (folder, work, precision), (folder, work, precision))
        figures = {f"{side}_images_per_cpu_second": rate[0] for side, rate in rates.items()}
        figures |= {
            "of_forward": rates["sampler"][0] / rates["forward"][0],
            "to_diffusers": rates["sampler"][0] / rates["diffusers"][0],
            "pool_images_per_second": one,
            "pool_of_forward": one / rates["forward"][1],
            "two_actors_to_one": two / one,
            "two_forwards_to_one": limit,
        }
        result |= {f"{name}_{precision}": round(value, 3) for name, value in figures.items()}
    ray.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main("--smoke" in sys.argv)
