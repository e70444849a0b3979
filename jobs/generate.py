"""Generate a dataset of samples from a trained model, exactly once, byte for byte."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import cli, tracking
from pipeline.generation.config import GenerateConfig


def run(config: GenerateConfig) -> dict[str, Any]:
    """Resolves the model once, then generates what is missing."""
    from pipeline.generation.job import generate, model_to_use

    folder, pinned = tracking.resolve_model(model_to_use(config))
    return {**generate(config, str(folder), pinned), "model": pinned}


if __name__ == "__main__":
    sys.exit(cli.main("generate", __doc__ or "", GenerateConfig, run, sys.argv[1:]))
