"""What the benchmarks of training share: the network, images in memory, images on disk, rates of a whole run."""

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec, TrainConfig
from pipeline.data.batch import Batch
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.training.trainer import train

UNET = ModelSpec(ModelConfig(), ImageConfig(32, 3), DiffusionConfig())
"""improved-diffusion's shape at 32x32x3: 6.95 M parameters."""


def in_memory(config: TrainConfig, image: ImageConfig) -> Iterator[Batch]:
    """Endless batches of random images, all made beforehand but for their ids."""
    size = config.batch_size
    generator = torch.Generator().manual_seed(0)
    shape = (size, image.channels, image.size, image.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    zeros, ones = torch.zeros(size, dtype=torch.int64), torch.ones(size)
    step = 0
    while True:
        yield Batch(images, zeros, torch.arange(step * size, (step + 1) * size), zeros, ones)
        step += 1


def on_disk(folder: Path, count: int, image: ImageConfig) -> str:
    """Shards of `count` random PNG images, written by the project's own preparation; needs Ray."""
    source = folder / "pictures" / "all"
    source.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        small = generator.integers(0, 256, (8, 8, image.channels), dtype=np.uint8)
        Image.fromarray(small).resize((image.size, image.size)).save(source / f"{i}.png")
    data = str(folder / "data")
    prepare(
        PrepareConfig(
            output=data,
            source="folder",
            input=str(source.parent),
            image_size=image.size,
            channels=image.channels,  # type: ignore[arg-type]
            validation_fraction=0.0,
        )
    )
    return data


def pipeline_rate(config: TrainConfig, warm_up_points: int = 1) -> tuple[float, dict[int, dict[str, float]]]:
    """Trains with the whole pipeline.

    Returns:
        images/s after the first points of the curves, everything between two points included; all points by step.
    """
    points: dict[int, dict[str, float]] = {}

    def keep(step: int, values: dict[str, float]) -> None:
        if "loss" in values:
            points[step] = values

    train(config, on_point=keep)
    rates = [values["images_per_second"] for _, values in sorted(points.items())][warm_up_points:]
    return len(rates) / sum(1 / rate for rate in rates), points


def two_over_one(rate: Callable[..., float], alone: tuple[Any, ...], together: tuple[Any, ...]) -> float:
    """What two bare processes do at once over what one does by itself: no two workers can gain more on this machine.

    Args:
        rate: a function of a module, which returns a rate; of its arguments there are those for the one process, and
            those for each of the two.
    """
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(rate, [together] * 2, chunksize=1)  # starts both and warms them up
        one = pool.apply(rate, alone)
        return sum(pool.starmap(rate, [together] * 2, chunksize=1)) / one
