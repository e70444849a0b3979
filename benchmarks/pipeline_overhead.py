"""Measures images/s of the whole pipeline, divided by those of the same step in a bare loop on tensors in memory.

    python -m benchmarks.pipeline_overhead [--threads N] [--smoke]

The pipeline is a normal training run: Ray Data reads and decodes PNG, Ray Train runs the worker, checkpoints go to disk
and points to MLflow. The bare loop is plain torch in a separate process. Half of it runs before the pipeline and half
after, so that a machine that slows down affects both.
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
from benchmarks.networks import UNET, in_memory
from pipeline.cluster.session import connect
from pipeline.commands import cli
from pipeline.config import ImageConfig, ModelConfig, ModelSpec, TrainConfig
from pipeline.tracking import address
from pipeline.training import network
from pipeline.training.state import new_state
from pipeline.training.step import make_backward, train_step


def bare(config: TrainConfig, spec: ModelSpec, steps: int) -> list[float]:
    """Seconds of each step, after two warm-up steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.prepare_device(config, device)
    state = new_state(config, spec, device)
    model = network.wrap(config, state.model, 1, device)
    run_backward = make_backward(config, spec, model, device)
    batches, seconds = in_memory(config, spec.image), list[float]()
    for _ in range(steps + 2):
        began = time.perf_counter()
        train_step(config, spec, state, run_backward, next(batches), device).loss.item()
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def bare_alone(config: TrainConfig, spec: ModelSpec, steps: int) -> list[float]:
    """`bare` in a separate process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(bare, (config, spec, steps))


def main(smoke: bool, threads: int, folder: Path) -> dict[str, object]:
    """Runs the bare loop and the pipeline. Returns the result that is printed."""
    steps, every = (4, 2) if smoke else (16, 4)
    model = ModelConfig(32, (1, 2), res_blocks=1, attention_resolutions=()) if smoke else UNET.model
    spec = ModelSpec(model, ImageConfig(8, 3) if smoke else UNET.image, UNET.diffusion)
    config = TrainConfig(
        data=str(folder / "data"),
        output=str(folder / "run"),
        steps=steps + every,
        batch_size=8 if smoke else 32,
        model=model,
        cpus_per_worker=threads,
        log_every=every,
        # One checkpoint among the timed steps, far more often than in real runs.
        checkpoint_every=2 * every,
        experiment="pipeline_overhead",
    )
    first = bare_alone(config, spec, steps // 2)
    connect(environment=address.environment(), preload="pipeline.training.worker")
    on_disk(folder, 64 if smoke else 640, spec.image)
    rate, points = pipeline_rate(config)
    second = bare_alone(config, spec, steps // 2)
    halves = [config.batch_size * len(half) / sum(half) for half in (first, second)]
    alone = config.batch_size * steps / sum(first + second)
    return {
        "threads": threads,
        "bare_images_per_second": round(alone, 2),
        "bare_before_and_after": [round(half, 2) for half in halves],
        "pipeline_images_per_second": round(rate, 2),
        "data_wait_share": round(max(p["data_wait_share"] for s, p in points.items() if s > every), 4),
        "ratio": round(rate / alone, 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="CPU threads of the training step"
    )
    parser.add_argument("--smoke", action="store_true", help="run only a few steps of a small network")
    options = parser.parse_args()
    with cli.result_stream() as stream, tempfile.TemporaryDirectory() as temporary:
        address.quieten()
        os.chdir(temporary)
        result = main(options.smoke, options.threads, Path(temporary))
        print(json.dumps(result), file=stream, flush=True)
        os.chdir("/")
