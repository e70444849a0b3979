"""Measure a model: held-out bits/dim, and the quality of a generated dataset beside the real one."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import cli, tracking
from pipeline.evaluation.evaluate import EvaluateConfig, evaluate


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Resolves the model once, then measures it over the cluster."""
    folder, pinned = tracking.resolve_model(config.model)
    return {"output": config.output, "model": pinned, "metrics": evaluate(config, str(folder))}


if __name__ == "__main__":
    sys.exit(cli.main("evaluate", __doc__ or "", EvaluateConfig, run, sys.argv[1:]))
