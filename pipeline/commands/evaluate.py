"""Measure a model by held-out bits/dim, and its samples against real images.

Example: ray-ddpm evaluate --model models:/photos@newest --data data/photos --samples samples --output figures
"""

from typing import Any

from pipeline.commands import cli
from pipeline.evaluation.config import EvaluateConfig, check


def execute(config: EvaluateConfig, checked: None = None) -> dict[str, Any]:
    """Resolves the model once and measures it over the cluster. The results also go to its MLflow run."""
    from pipeline.evaluation.evaluate import evaluate
    from pipeline.tracking import registry

    model, pinned = registry.resolve_model(config.model)
    metrics, on, pictures = evaluate(config, model)
    registry.log_results(pinned, "evaluate", metrics, pictures)
    result = {"output": config.output, "model": pinned, "metrics": metrics}
    return result | ({"measured_on": on} if on else {})


def main(arguments: list[str]) -> int:
    """Runs the job with these flags; returns its exit code."""
    return cli.main(
        "evaluate",
        __doc__ or "",
        EvaluateConfig,
        execute,
        arguments,
        check=check,
        workers=lambda config: "pipeline.evaluation.features",
    )
