"""Generate a dataset of samples from a trained model. A repeated job makes only what is missing, byte for byte the same.

Example: ray-ddpm generate --model models:/photos@newest --output samples --count 10000 --sampler ddim --sampling-steps 50
"""

from typing import Any

from pipeline.commands import cli
from pipeline.errors import InputError
from pipeline.generation.config import GenerateConfig, check_settings


def check(config: GenerateConfig) -> None:
    """Checks the settings before Ray is needed. With --verify the output names the model."""
    needed = {"--model": config.model or config.verify, "--output": config.output}
    if missing := [flag for flag, given in needed.items() if not given]:
        raise InputError(
            f"required and not given: {', '.join(missing)} (see {cli.program('generate')} --help)"
        )
    check_settings(config)


def execute(config: GenerateConfig, checked: None = None) -> dict[str, Any]:
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
        check=check,
        workers=lambda config: "pipeline.generation.sampler",
    )
