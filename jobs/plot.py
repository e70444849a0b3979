"""Draw a model: samples, forward and reverse process, schedules, the bound over t, the nearest training images."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import cli, tracking
from pipeline.errors import InputError


@dataclass(frozen=True)
class PlotConfig:
    """What to draw, and where."""

    model: str
    """Exported model folder, models:/NAME/VERSION or models:/NAME@ALIAS."""
    data: str
    """The dataset that the model was trained on (URI)."""
    output: str
    """Folder for the pictures."""
    seed: int = 0
    """Seed of the samples drawn."""


def run(config: PlotConfig) -> dict[str, Any]:
    """Draws every picture."""
    from pipeline import pictures
    from pipeline.models.export import load_model

    folder, pinned = tracking.resolve_model(config.model)
    output = Path(config.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {config.output}: can't be written: {error.strerror}") from None
    _, spec = load_model(folder)
    paths = [
        pictures.sample_grid(folder, output / "samples.png", seed=config.seed),
        pictures.process_strip(folder, config.data, output / "process.png", seed=config.seed),
        pictures.schedule_curves(spec, output / "schedules.png"),
        pictures.bound_terms(folder, config.data, output / "bound.png", seed=config.seed),
        pictures.nearest_neighbours(folder, config.data, output / "nearest.png", seed=config.seed),
    ]
    return {"output": config.output, "model": pinned, "count": len(paths)}


if __name__ == "__main__":
    sys.exit(cli.main("plot", __doc__ or "", PlotConfig, run, sys.argv[1:]))
