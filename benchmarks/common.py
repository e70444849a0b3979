"""Shared by the benchmarks of whole runs: images on disk, the rate of a run, the machine's own limit."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import ImageConfig, TrainConfig
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.training.trainer import train


def on_disk(folder: Path, count: int, image: ImageConfig) -> str:
    """Writes shards of `count` random PNG images with the prepare job. Needs Ray.

    Returns:
        the folder of the shards.
    """
    source = folder / "pictures" / "all"
    source.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        small = generator.integers(0, 256, (8, 8, image.channels), dtype=np.uint8)
        Image.fromarray(small.squeeze()).resize((image.size, image.size)).save(source / f"{i}.png")
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

    Args:
        warm_up_points: first points of the curves to leave out.

    Returns:
        images/s over the remaining points, with all time between them; and all points by step.
    """
    points: dict[int, dict[str, float]] = {}

    def keep(step: int, values: dict[str, float]) -> None:
        if "loss" in values:
            points[step] = values

    train(config, on_point=keep)
    rates = [values["images_per_second"] for _, values in sorted(points.items())][warm_up_points:]
    return len(rates) / sum(1 / rate for rate in rates), points


def two_over_one(rate: Callable[..., float], alone: tuple[Any, ...], together: tuple[Any, ...]) -> float:
    """The rate of two bare processes at once, divided by that of one alone.

    It limits the gain of two workers on this machine.

    Args:
        rate: function at module level that returns a rate.
        alone: its arguments for the single process.
        together: its arguments for each of the two processes.
    """
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(rate, [together] * 2, chunksize=1)  # starts both and warms them up
        one = pool.apply(rate, alone)
        return sum(pool.starmap(rate, [together] * 2, chunksize=1)) / one
