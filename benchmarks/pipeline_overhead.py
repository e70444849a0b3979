"""Measures images/s of the whole pipeline, divided by those of the same step in a bare loop on tensors in memory.

    python -m benchmarks.pipeline_overhead [--network digits|unet|cifar|imagenet_64] [--threads N] [--smoke]

The pipeline is a normal training run: Ray Data reads and decodes PNG, Ray Train runs the worker, checkpoints go to disk
and points to MLflow. The bare loop is plain torch in a separate process. Half of it runs before the pipeline and half
after, so that a machine that slows down affects both. Both use a GPU where there is one: 128 images a step and many more
steps. The networks are those of `benchmarks.networks`; `digits` has the batches of `make demo`.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import on_disk, pipeline_rate
from benchmarks.networks import NETWORKS, in_memory
from pipeline.cluster.session import connect
from pipeline.commands import cli
from pipeline.config import ImageConfig, ModelConfig, ModelSpec, TrainConfig
from pipeline.tracking import address
from pipeline.training import network
from pipeline.training.state import new_state
from pipeline.training.step import make_backward, train_step

WARM_UP = 5  # on a GPU the fourth step records the graph


def bare(config: TrainConfig, spec: ModelSpec, steps: int) -> float:
    """Images per second over some steps after the warm-up. Nothing waits for a GPU before the last step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.prepare_device(config, device)
    state = new_state(config, spec, device)
    model = network.wrap(config, state.model, 1, device)
    run_backward = make_backward(config, spec, model, device)
    batches = in_memory(config, spec.image)

    def advance(count: int) -> None:
        for _ in range(count):
            outcome = train_step(config, spec, state, run_backward, next(batches), device)
        outcome.loss.item()

    advance(WARM_UP)
    began = time.perf_counter()
    advance(steps)
    return config.batch_size * steps / (time.perf_counter() - began)


def bare_alone(config: TrainConfig, spec: ModelSpec, steps: int) -> float:
    """`bare` in a separate process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(bare, (config, spec, steps))


def main(name: str, smoke: bool, threads: int, folder: Path) -> dict[str, object]:
    """Runs the bare loop and the pipeline. Returns the result that is printed."""
    gpu = torch.cuda.is_available()
    spec, batch, steps, every, images = NETWORKS[name], 32, 16, 4, 640
    if name == "digits":
        batch, steps, every, images = 128, 60, 10, 1620
    if gpu:
        batch, steps, every, images = 128, 600, 100, 10_000
    if smoke:
        model = ModelConfig(32, (1, 2), res_blocks=1, attention_resolutions=())
        spec, batch, steps, every, images = ModelSpec(model, ImageConfig(8, 3), spec.diffusion), 8, 4, 2, 64
    config = TrainConfig(
        data=str(folder / "data"),
        output=str(folder / "run"),
        steps=steps + every,
        batch_size=batch,
        model=spec.model,
        cpus_per_worker=threads,
        log_every=every,
        # Two checkpoints among the timed steps, far more often than in real runs.
        checkpoint_every=steps // 2,
        gpu=gpu,
        experiment="pipeline_overhead",
    )
    first = bare_alone(config, spec, steps // 2)
    connect(environment=address.environment(), preload="pipeline.training.worker")
    on_disk(folder, images, spec.image)
    rate, points = pipeline_rate(config)
    second = bare_alone(config, spec, steps // 2)
    alone = 2 / (1 / first + 1 / second)
    return {
        "network": name,
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {threads} threads",
        "bare_images_per_second": round(alone, 2),
        "bare_before_and_after": [round(first, 2), round(second, 2)],
        "pipeline_images_per_second": round(rate, 2),
        "data_wait_share": round(max(p["data_wait_share"] for s, p in points.items() if s > every), 4),
        "ratio": round(rate / alone, 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=list(NETWORKS), default="unet")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="CPU threads of the training step"
    )
    parser.add_argument("--smoke", action="store_true", help="run only a few steps of a small network")
    options = parser.parse_args()
    with cli.result_stream() as stream, tempfile.TemporaryDirectory() as temporary:
        address.quieten()
        os.chdir(temporary)
        result = main(options.network, options.smoke, options.threads, Path(temporary))
        print(json.dumps(result), file=stream, flush=True)
        os.chdir("/")
