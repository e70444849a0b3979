"""Generate a dataset of samples from a trained model. A repeated job makes only what is missing, byte for byte the same.

Example: ray-ddpm generate --model models:/photos@newest --output samples --count 10000 --sampler ddim --sampling-steps 50
"""

from typing import Any

from pipeline.commands import cli
from pipeline.generation.config import GenerateConfig


def execute(config: GenerateConfig) -> dict[str, Any]:
    """Resolves the model once, and generates the missing samples."""
    from pipeline.generation.job import generate, model_to_use
    from pipeline.tracking import registry

    model, pinned = registry.resolve_model(model_to_use(config))
    return {**generate(config, model, pinned), "model": pinned}


def main(arguments: list[str]) -> int:
    """Runs the job with these flags; returns its exit code."""
    return cli.main(
        "generate",
        __doc__ or "",
        GenerateConfig,
        execute,
        arguments,
        workers=lambda config: "pipeline.generation.sampler",
    )
