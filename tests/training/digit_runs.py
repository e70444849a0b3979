"""Settings and readers of Ray Train runs on the digits."""

from pathlib import Path
from typing import Any

import torch

from pipeline import storage
from pipeline.config import DiffusionConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipeline.tracking import runs
from pipeline.training import checkpoint
from pipeline.training.trainer import Trained

ROWS, BATCH = 540, 30  # 18 steps are an epoch of `few_digits`


def settings(home: Path, output: str, **changes: Any) -> TrainConfig:
    options = {"steps": 18, "batch_size": BATCH, "log_every": 4, "checkpoint_every": 3, "keep_checkpoints": 2}
    options["optimizer"] = OptimizerConfig(ema_decays=(0.9, 0.99), warmup_steps=5)
    return TrainConfig(
        data=str(home / "digits"),
        output=output,
        model=ModelConfig(
            model_channels=32, channel_multipliers=(1,), res_blocks=1, attention_resolutions=()
        ),
        diffusion=DiffusionConfig(timesteps=20, timestep_sampler="loss_second_moment"),
        precision="fp32",
        readers=1,
        **(options | changes),
    )


def newest(output: str) -> tuple[checkpoint.Saved, dict[str, Any]]:
    return checkpoint.read(checkpoint.complete(storage.join(output, "checkpoints"))[0])


def curve(trained: Trained, name: str) -> dict[int, float]:
    """Return a curve from MLflow by step, and check that each step has one point."""
    history = runs.open_client().get_metric_history(trained.run.id, name)
    assert len({point.step for point in history}) == len(history)
    return {point.step: point.value for point in history}


def assert_same(mine: checkpoint.Saved, other: checkpoint.Saved) -> None:
    """Check that every tensor of both is the same, bit for bit."""
    assert (mine.step, len(mine.averages)) == (other.step, len(other.averages))
    pairs = [(mine.weights, other.weights), *zip(mine.averages, other.averages, strict=True)]
    pairs += [(mine.optimizer, other.optimizer), (mine.timestep_sampler, other.timestep_sampler)]
    for a, b in pairs:
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in b)
