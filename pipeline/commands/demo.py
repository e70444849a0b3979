"""The whole pipeline on real handwritten digits: prepare, train, register, generate, draw.

Example: ray-ddpm demo --output demo
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline import storage
from pipeline.commands import cli, generate, plot, prepare, train
from pipeline.config import DiffusionConfig, ModelConfig, OptimizerConfig, Steps, TrainConfig
from pipeline.data.shards import PrepareConfig
from pipeline.errors import InputError
from pipeline.generation.config import GenerateConfig
from pipeline.ranges import Positive
from pipeline.tracking import address

T = TypeVar("T")


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo."""

    output: str = "demo"
    """Folder for the shards, the run, the samples and the pictures: a new or empty one."""
    steps: Steps = 300
    """Optimizer steps."""
    workers: Positive = 2
    """Data-parallel training workers."""
    count: Positive = 256
    """Samples to generate."""


def execute(config: DemoConfig) -> dict[str, Any]:
    """Runs the jobs one after the other in one Ray, as a user would run them."""
    if not storage.is_local(config.output):
        raise InputError(f"--output {config.output}: the demo needs a local folder")
    root = Path(storage.absolute(config.output))
    storage.check_writable(str(root))
    if root.exists() and any(root.iterdir()):
        raise InputError(f"--output {config.output} is not empty: remove it, or choose another folder")
    data, samples, pictures = root / "digits", root / "samples", root / "pictures"
    timed("prepare", lambda: prepare.execute(PrepareConfig(output=str(data), source="digits")))
    settings = training(config, data, root / "run")
    trained = timed("train", lambda: train.execute(settings, train.check(settings)))
    model = "models:/digits@newest"
    generated = timed(
        "generate",
        lambda: generate.execute(
            GenerateConfig(
                model=model,
                output=str(samples),
                count=config.count,
                sampler="ddim",
                sampling_steps=25,
                guidance=1.5,
            )
        ),
    )
    timed("plot", lambda: plot.execute(plot.PlotConfig(model, str(data), str(pictures))))
    say(f"pictures   {pictures}/samples.png, process.png, schedules.png, bound.png, nearest.png")
    say(f"dataset    {samples}  ({generated['count']} samples)")
    say(f"model      {trained['model']}  (also the folder {root / 'run' / 'model'})")
    say(f"MLflow     {address.ui_command()}")
    return {**trained, "output": str(root), "count": generated["count"]}


def training(config: DemoConfig, data: Path, output: Path) -> TrainConfig:
    """A small class-conditional UNet for 8x8 digits."""
    return TrainConfig(
        data=str(data),
        output=str(output),
        steps=config.steps,
        workers=config.workers,
        batch_size=128,
        model=ModelConfig(
            model_channels=32,
            channel_multipliers=(1, 2),
            attention_resolutions=(4,),
            class_conditional=True,
        ),
        diffusion=DiffusionConfig(schedule="cosine", timesteps=400),
        optimizer=OptimizerConfig(learning_rate=2e-3, ema_decays=(0.99,)),
        log_every=25,
        checkpoint_every=150,
        run_name="digits",
        register="digits",
    )


def timed(name: str, part: Callable[[], T]) -> T:
    """Runs a part and says how long it took."""
    began = time.perf_counter()
    result = part()
    say(f"{name:10} {time.perf_counter() - began:.1f} s")
    return result


def say(line: str) -> None:
    """Prints a line to stderr, because stdout carries only the result."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Runs the job with these flags; returns its exit code."""
    return cli.main(
        "demo",
        __doc__ or "",
        DemoConfig,
        execute,
        arguments,
        workers=cli.training_workers,
        meanwhile=cli.open_tracking,
    )
