"""Train a diffusion model on image shards with Ray Train, tracked in MLflow.

SIGTERM and Ctrl-C save the run and end it with exit code 128 + the signal's number (143, 130); --resume goes on from the
newest whole checkpoint in --output, and starts a new run where there is none.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import cli, tracking
from pipeline.config import TrainConfig


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains, exports, logs a grid of samples, registers."""
    from pipeline.pictures import sample_grid
    from pipeline.training.trainer import train

    trained = train(config)
    with tempfile.TemporaryDirectory() as folder:
        picture = sample_grid(trained.folder, Path(folder) / "samples.png", seed=config.seed)
        tracking.log_file(trained.run, picture)
    tracking.end_run(trained.run)
    return {
        "output": config.output,
        "model": trained.model,
        "run_id": trained.run.id,
        "metrics": trained.metrics,
        "count": config.steps,
    }


def check(config: TrainConfig) -> None:
    """Refuses what can't work, before a cluster is asked for anything."""
    from pipeline.training.trainer import check as check_training

    check_training(config)


if __name__ == "__main__":
    sys.exit(cli.main("train", __doc__ or "", TrainConfig, run, sys.argv[1:], check=check))
