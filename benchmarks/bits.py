"""Compares held-out bits/dim between schedules, losses, draws of t and inputs, with both decoders of L_0.

    python -m benchmarks.bits [--data digits|mnist] [--steps N] [--cases NAME …] [--smoke]

All cases train one small network on equally many images with the same seed. Prints one JSON line per case, and one with
the codes without a network (`codes`) for the same held-out images. `frechet_distance` and `right`, the share of right
labels, are those of samples drawn in 100 steps, by a classifier trained on the real images; the first line has those of
held-out images. Uses one thread, so that several processes can share a machine.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import first_step
from benchmarks.first_step import SOURCES, batches
from pipeline.config import DiffusionConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipeline.data.index import Splits, open_splits
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.evaluation.bits import held_out_bits, values_that_occur
from pipeline.evaluation.classifier import Classifier, accuracy, fit
from pipeline.evaluation.codes import trivial_codes
from pipeline.evaluation.reading import read_images
from pipeline.training import loop
from pipeline.training.checks import make_spec
from pipeline.training.meter import Meter
from pipeline.training.state import new_state

FOURIER = (3, 4, 5, 6, 7)
LEARNED: dict[str, Any] = {"variance": "learned_range", "loss": "hybrid"}


def _log_snr(first: float, last: float, **settings: Any) -> dict[str, Any]:
    """Settings of the log_snr schedule, with fixed_small unless they name another variance."""
    ends = {"schedule": "log_snr", "log_snr_first": first, "log_snr_last": last}
    return {"variance": "fixed_small", **ends, **settings}


CASES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "cosine, hybrid": LEARNED,
    "log_snr 10 to -10": {"schedule": "log_snr"},
    "log_snr 8 to -8": _log_snr(8, -8),
    "log_snr 8 to -8, fixed_large": _log_snr(8, -8, variance="fixed_large"),
    "log_snr 8 to -8, hybrid": _log_snr(8, -8, **LEARNED),
    "log_snr 8 to -8, T 1000": _log_snr(8, -8, timesteps=1000),
    "log_snr 8 to -8, vlb, second moment": _log_snr(
        8, -8, variance="learned_range", loss="vlb", timestep_sampler="loss_second_moment"
    ),
    "log_snr 8 to -8, Fourier": _log_snr(8, -8, fourier_features=FOURIER),
    "log_snr 12 to -6": _log_snr(12, -6),
    "log_snr 12 to -6, T 1000": _log_snr(12, -6, timesteps=1000),
    "log_snr 12 to -6, T 1000, Fourier": _log_snr(12, -6, timesteps=1000, fourier_features=FOURIER),
    "log_snr 12 to -6, T 1000, hybrid": _log_snr(12, -6, timesteps=1000, **LEARNED),
}
BATCH, TIMESTEPS, TERMS, IMAGES, READ = 64, 400, 80, 177, 20_000
SAMPLES, STEPS = 2 * IMAGES, 100


def judged(net: Classifier, real: Tensor, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Compares images with real ones by a classifier: the distance, and the share of right labels."""
    distance = first_step.measured(net, real, images)["frechet_distance"]
    return {"frechet_distance": distance, "right": round(accuracy(net, images, labels), 4)}


def measured(
    splits: Splits,
    judge: Callable[[Tensor, Tensor], dict[str, float]],
    settings: dict[str, Any],
    steps: int,
    channels: int,
) -> dict[str, Any]:
    """Trains with these settings.

    Args:
        judge: `judged` with its first two arguments.
        settings: fields of DiffusionConfig, and `fourier_features` of ModelConfig.
        steps: optimizer steps.
        channels: `model_channels` of the network.

    Returns:
        the bound with both decoders, in bits/dim, the judgement of samples, and the CPU minutes of training.
    """
    diffusion = {"timesteps": TIMESTEPS, **settings}
    features = diffusion.pop("fourier_features", ())
    config = TrainConfig(
        data="", output="", batch_size=BATCH, steps=steps,
        model=ModelConfig(
            channels, (1, 2), attention_resolutions=(4,), class_conditional=True, fourier_features=features
        ),
        diffusion=DiffusionConfig(**diffusion),
        optimizer=OptimizerConfig(learning_rate=1e-3, ema_decays=(0.998,)),
    )  # fmt: skip
    index, held_out, cpu = splits["train"], splits["validation"], torch.device("cpu")
    images, labels = read_images(index, np.arange(index.rows))
    spec, began = make_spec(config, index), time.process_time()
    state = new_state(config, spec, cpu)
    stream = batches(index, images, labels, range(steps), config.seed, BATCH)
    loop.train(config, spec, state, state.model, stream, Meter(config, 1, cpu), loop.Observer())
    minutes = (time.process_time() - began) / 60
    first_step.set_average(state.model, state)
    ids = np.arange(min(held_out.rows, IMAGES))
    bits = held_out_bits(
        state.model.eval(), spec, held_out, ids, terms=TERMS, occurs=values_that_occur(index)
    )
    assert bits.softmax is not None
    found = {
        "bits_per_dim": bits.bits_per_dim, "L_0": bits.decoder, "L_T": bits.prior,
        "softmax": bits.softmax[0], "softmax_stderr": bits.softmax[1], "L_0_softmax": bits.softmax[2],
    }  # fmt: skip
    samples = first_step.drawn(state.model, spec, SAMPLES, {"sampling_steps": min(STEPS, steps)})
    wanted = torch.arange(SAMPLES) % len(spec.image.classes)
    rounded = {name: round(value, 4) for name, value in found.items()}
    return rounded | judge(samples, wanted) | {"cpu_minutes": round(minutes, 1)}


def main(data: str, steps: int, cases: list[str], channels: int, folder: Path) -> None:
    """Prints a line for the codes and one for each case."""
    source, place, size = SOURCES[data]
    size = {"mnist": 28}.get(data, size)
    prepare(PrepareConfig(output=str(folder), source=source, input=place, image_size=size))  # type: ignore[arg-type]
    splits = open_splits(str(folder))
    real, classes = read_images(splits["train"], np.arange(min(splits["train"].rows, READ)))
    judge = partial(judged, fit(splits["train"].image, real, classes, steps=min(steps, 500)), real)
    images, labels = read_images(splits["validation"], np.arange(min(splits["validation"].rows, IMAGES)))
    codes = trivial_codes(*(x.permute(0, 2, 3, 1).numpy() for x in (real, images)))
    rounded = {name: round(value, 4) for name, value in codes.items()}
    print(json.dumps({"data": data, "codes": rounded, **judge(images, labels)}), flush=True)
    for name in cases:
        row = measured(splits, judge, CASES[name], steps, channels)
        print(json.dumps({"data": data, "case": name, "steps": steps, **row}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of 64 images")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--smoke", action="store_true", help="run only digits, two cases and a few steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        if options.smoke:
            main("digits", 2, ["cosine", "log_snr 8 to -8, hybrid"], 16, Path(temporary) / "data")
        else:
            main(options.data, options.steps, options.cases, options.channels, Path(temporary) / "data")
