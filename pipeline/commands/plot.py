"""Draw a model: samples, forward and reverse process, schedules, the bound over t, the nearest training images.

Example: ray-ddpm plot --model models:/photos@newest --data data/photos --output pictures
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.commands import cli
from pipeline.config import Reading
from pipeline.output import check_apart
from pipeline.ranges import Seed


@dataclass(frozen=True)
class PlotConfig:
    """The model to draw, and the place of the pictures."""

    model: str
    """Exported model folder, models:/NAME/VERSION or models:/NAME@ALIAS."""
    data: str
    """Dataset that the model was trained on (URI)."""
    output: str
    """Folder for the pictures (URI)."""
    seed: Seed = 0
    """Seed of the samples."""
    reading: Reading = field(default_factory=Reading)


def execute(config: PlotConfig) -> dict[str, Any]:
    """Draws every picture. The pictures also go to the model's MLflow run."""
    from pipeline.data.index import open_splits
    from pipeline.models.export import load_model
    from pipeline.pictures import make
    from pipeline.tracking import registry

    packed, pinned = registry.resolve_model(config.model)
    model, spec = load_model(packed)
    check_apart(config.output, "--data", config.data)
    splits = open_splits(config.data, spec.image.size, config.reading)
    train, held_out = splits["train"], splits["validation" if "validation" in splits else "train"]
    storage.check_writable(config.output)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        paths = [
            make.draw_samples(model, spec, place / "samples.png", seed=config.seed),
            make.process_strip(model, spec, train, place / "process.png", seed=config.seed),
            make.schedule_curves(spec, place / "schedules.png"),
            make.bound_terms(model, spec, held_out, place / "bound.png", seed=config.seed),
            make.nearest_neighbours(model, spec, train, place / "nearest.png", seed=config.seed),
        ]
        for path in paths:
            storage.write_atomic(storage.join(config.output, path.name), path.read_bytes())
        registry.log_results(pinned, "plot", {}, [str(path) for path in paths])
    return {"output": config.output, "model": pinned, "count": len(paths)}


def main(arguments: list[str]) -> int:
    """Runs the job with these flags; returns its exit code."""
    return cli.main("plot", __doc__ or "", PlotConfig, execute, arguments)
