"""Finds the best first step of samplers: the Fréchet distance of samples by the alpha_bar at which they start.

    python -m benchmarks.first_step [--data digits mnist cifar10] [--smoke]

A small class-conditional model with a cosine schedule is trained on each dataset and measured at three stages. All
samplers use the same noise. The distances use the features of a classifier trained on the real images. `saturated` is
the share of pixels at 0 or 255. The row `real` measures held-out images.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DiffusionConfig, ModelConfig, ModelSpec, OptimizerConfig, TrainConfig
from pipeline.data.batch import Batch
from pipeline.data.index import DatasetIndex, Splits, open_splits
from pipeline.data.order import batch_rows
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.evaluation.classifier import Classifier, fit
from pipeline.evaluation.frechet import frechet_distance, moments_of
from pipeline.evaluation.reading import read_images
from pipeline.models.sampling import sample_images
from pipeline.training import loop
from pipeline.training.checks import make_spec
from pipeline.training.meter import Meter
from pipeline.training.state import TrainState, new_state

SHARED = Path(__file__).parents[2] / "shared" / "data"
SOURCES = {
    "digits": ("digits", "", 8),
    "mnist": ("idx", str(SHARED / "mnist"), 16),
    "cifar10": ("auto", str(SHARED / "cifar10"), 16),
}
STAGES = (100, 400, 1600)
SAMPLERS: dict[str, dict[str, Any]] = {
    "ancestral": {"sampler": "ancestral"},
    "ddim, eta 1": {"sampler": "ddim", "eta": 1.0},
    "ddim": {"sampler": "ddim"},
    "dpm_solver": {"sampler": "dpm_solver"},
}
LEAST = (0.0, 1e-3, 5e-3, 2e-2)
STEPS, BATCH, SAMPLES, REAL = 25, 32, 500, 10_000


def batches(
    index: DatasetIndex, images: Tensor, labels: Tensor, steps: range, seed: int, size: int
) -> Iterator[Batch]:
    """Yields the batches of these steps, `size` images each, from images in memory.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
    """
    plan = index.plan(seed, size)
    rows = batch_rows(plan, steps.start, steps.stop)
    for ids, epochs in zip(plan.first_id[rows.group] + rows.row, rows.epoch, strict=True):
        chosen = torch.from_numpy(ids)
        yield Batch(images[chosen], labels[chosen], chosen, torch.from_numpy(epochs), torch.ones(len(ids)))


def trained(
    data: str, splits: Splits, stages: tuple[int, ...]
) -> Iterator[tuple[int, torch.nn.Module, ModelSpec]]:
    """Yields the step, the averaged model and its spec at each stage. The model is the same object every time."""
    config = TrainConfig(
        data=data, output="", batch_size=BATCH, label_dropout=0.0,
        model=ModelConfig(32, (1, 2), attention_resolutions=(4,), class_conditional=True),
        diffusion=DiffusionConfig(schedule="cosine"),
        optimizer=OptimizerConfig(learning_rate=1e-3, ema_decays=(0.99,)),
    )  # fmt: skip
    index, cpu = splits["train"], torch.device("cpu")
    images, labels = read_images(index, np.arange(index.rows))
    spec = make_spec(config, index)
    state, shown = new_state(config, spec, cpu), new_state(config, spec, cpu).model
    for begin, end in zip((0, *stages), stages, strict=False):
        stream = batches(index, images, labels, range(begin, end), config.seed, BATCH)
        stage = TrainConfig(**{**vars(config), "steps": end})
        loop.train(stage, spec, state, state.model, stream, Meter(stage, 1, cpu), loop.Observer())
        set_average(shown, state)
        yield end, shown.eval(), spec


def set_average(model: torch.nn.Module, state: TrainState) -> None:
    """Replaces the weights of a model by their first average."""
    for parameter, average in zip(model.parameters(), state.averages[0], strict=True):
        parameter.data.copy_(average)


def drawn(model: torch.nn.Module, spec: ModelSpec, count: int, settings: dict[str, Any]) -> Tensor:
    """Samples of each class in turn, in `STEPS` steps unless `settings` has others."""
    settings = {"sampling_steps": STEPS, **settings}
    parts = [
        sample_images(model, spec, ids, labels=ids % len(spec.image.classes), **settings)
        for ids in torch.arange(count).split(250)
    ]
    return torch.cat(parts)


def measured(net: Classifier, real: Tensor, images: Tensor) -> dict[str, float]:
    with torch.no_grad():
        moments = [
            moments_of(torch.cat([net.features(p) for p in x.split(500)]).numpy()) for x in (real, images)
        ]
    saturated = ((images == 0) | (images == 255)).float().mean().item()
    return {"frechet_distance": round(frechet_distance(*moments), 4), "saturated": round(saturated, 4)}


def main(name: str, folder: Path, smoke: bool) -> Iterator[dict[str, Any]]:
    """Yields a row for each stage, sampler and first step."""
    source, place, size = SOURCES[name]
    prepare(PrepareConfig(output=str(folder), source=source, input=place, image_size=size))  # type: ignore[arg-type]
    splits = open_splits(str(folder))
    some = np.arange(min(splits["train"].rows, 200 if smoke else REAL))
    real, labels = read_images(splits["train"], some)
    net = fit(splits["train"].image, real, labels, steps=2 if smoke else 500)
    held_out, _ = read_images(splits["validation"], np.arange(min(splits["validation"].rows, SAMPLES)))
    yield {"data": name, "sampler": "real", "samples": len(held_out), **measured(net, real, held_out)}
    for step, model, spec in trained(str(folder), splits, (1, 2) if smoke else STAGES):
        for sampler, settings in SAMPLERS.items():
            for least in LEAST if sampler in ("ddim", "dpm_solver") else LEAST[:1]:
                images = drawn(model, spec, 20 if smoke else SAMPLES, settings | {"least_alpha_bar": least})
                about = {"data": name, "steps": step, "sampler": sampler, "least_alpha_bar": least}
                yield about | measured(net, real, images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--smoke", action="store_true", help="run only digits and a few steps")
    options = parser.parse_args()
    for chosen in ["digits"] if options.smoke else options.data:
        with tempfile.TemporaryDirectory() as temporary:
            for row in main(chosen, Path(temporary) / "data", options.smoke):
                print(json.dumps(row), flush=True)
