"""A tiny training problem in memory, in the order of the real plan, without Ray."""

import multiprocessing
import socket
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.multiprocessing as mp

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec, OptimizerConfig, TrainConfig
from pipeline.data.batch import Batch
from pipeline.data.order import Plan, batch_rows, cut

IMAGE = ImageConfig(size=8, channels=1, classes=("even", "odd"))
MODEL = ModelConfig(
    model_channels=16,
    channel_multipliers=(1, 2),
    res_blocks=1,
    attention_resolutions=(4,),
    class_conditional=True,
)


def problem(**changes: object) -> tuple[TrainConfig, ModelSpec]:
    diffusion = DiffusionConfig(**{"schedule": "cosine", "timesteps": 20} | changes.pop("diffusion", {}))  # type: ignore[operator]
    # fp32 on every machine, since bf16 would magnify differences in the order of sums.
    options = {
        "precision": "fp32",
        "steps": 20,
        "batch_size": 10,
        "seed": 5,
        "random_flip": True,
        "log_every": 5,
    }
    options |= changes
    config = TrainConfig(
        data="",
        output="",
        model=MODEL,
        diffusion=diffusion,
        optimizer=OptimizerConfig(warmup_steps=5),
        **options,
    )
    return config, ModelSpec(MODEL, IMAGE, diffusion)


def batches(config: TrainConfig, rank: int = 0, world_size: int = 1, start: int = 0) -> Iterator[Batch]:
    """Yield the rank's batches from step `start` on, of 37 random images in four groups."""
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (37, 1, 8, 8), dtype=np.uint8))
    plan = Plan(np.array([10, 10, 10, 7]), config.seed, config.batch_size, lanes=2)
    yield from planned(plan, images, torch.arange(37) % 2, range(start, config.steps), rank, world_size)


def planned(
    plan: Plan, images: torch.Tensor, labels: torch.Tensor, wanted: range, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Yield the rank's batches of the steps `wanted`. `images` and `labels` are a whole dataset in order of ids."""
    rows = batch_rows(plan, wanted.start, wanted.stop, *cut(plan.batch_size, rank, world_size))
    for ids, epochs in zip(plan.ids(rows), rows.epoch, strict=True):
        chosen = torch.from_numpy(ids)
        yield Batch(images[chosen], labels[chosen], chosen, torch.from_numpy(epochs), torch.ones(len(ids)))


def start_ranks(rank: Callable[..., None], arguments: tuple[object, ...], count: int) -> None:
    """Run the ranks of a process group, each `rank(number, *arguments)` in a process of its own, to their end.

    They are forked from a process that has imported the tests' modules, and torch._dynamo, which DDP imports. Each
    spawned one would take many seconds for that.
    """
    modules = [f"tests.training.test_{name}" for name in ("loop", "agreement", "checkpoints_in_bad_weather")]
    multiprocessing.set_forkserver_preload(["torch._dynamo", *modules])
    mp.start_processes(rank, arguments, count, start_method="forkserver")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
