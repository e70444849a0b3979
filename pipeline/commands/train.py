"""Train a diffusion model with Ray Train, and track it in MLflow.

Example: ray-ddpm train --data data/photos --output runs/photos --steps 20000 --workers 2 --register photos

SIGTERM and Ctrl-C save the run and end it with exit code 128 + the signal's number (143, 130). --resume continues it.
"""

from typing import Any

from pipeline import disk_cache
from pipeline.commands import cli
from pipeline.config import TrainConfig


def execute(config: TrainConfig, data: Any) -> dict[str, Any]:
    """Trains on the data that `check` opened."""
    from pipeline.training.trainer import train

    trained = train(config, data)
    return {
        "output": config.output,
        "model": trained.model,
        "run_id": trained.run.id,
        "metrics": trained.metrics,
        "count": trained.spec.provenance["steps"],
    }


def check(config: TrainConfig) -> Any:
    """Checks the settings before a cluster is needed, and opens the data."""
    from pipeline.training.checks import check as check_training

    return check_training(config)[0]


def main(arguments: list[str]) -> int:
    """Runs the job with these flags; returns its exit code."""
    return cli.main(
        "train",
        __doc__ or "",
        TrainConfig,
        execute,
        arguments,
        check=check,
        workers=cli.training_workers,
        meanwhile=cli.open_tracking,
        environment=lambda config: disk_cache.environment(config.cache_dir, config.cache_gb),
    )
