"""Compares held-out bits/dim between schedules, losses and draws of t, with both decoders of L_0.

    python -m benchmarks.bits [--data digits|mnist] [--steps N] [--cases NAME …] [--smoke]

All cases train one small network on equally many images with the same seed. Prints one JSON line per case, and one with
the codes without a network (`codes`) for the same held-out images. Uses one thread, so that several processes can share a
machine.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.first_step import SOURCES, batches
from pipeline.config import DiffusionConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipeline.data.index import Splits, open_splits
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.evaluation.bits import held_out_bits, values_that_occur
from pipeline.evaluation.codes import trivial_codes
from pipeline.evaluation.reading import read_images
from pipeline.training import loop
from pipeline.training.checks import make_spec
from pipeline.training.meter import Meter
from pipeline.training.state import new_state

LEARNED: dict[str, Any] = {"variance": "learned_range", "loss": "hybrid"}
CASES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "cosine, hybrid": LEARNED,
    "log_snr 10 to -10": {"schedule": "log_snr"},
    "log_snr 8 to -8": {"schedule": "log_snr", "log_snr_first": 8, "log_snr_last": -8},
    "log_snr 8 to -8, fixed_small": {
        "schedule": "log_snr", "log_snr_first": 8, "log_snr_last": -8, "variance": "fixed_small"
    },
    "log_snr 8 to -8, hybrid": {"schedule": "log_snr", "log_snr_first": 8, "log_snr_last": -8, **LEARNED},
    "log_snr 8 to -8, vlb, second moment": {
        "schedule": "log_snr", "log_snr_first": 8, "log_snr_last": -8, "variance": "learned_range", "loss": "vlb",
        "timestep_sampler": "loss_second_moment",
    },
    "log_snr 6 to -6, hybrid": {"schedule": "log_snr", "log_snr_first": 6, "log_snr_last": -6, **LEARNED},
    "log_snr 8 to -8, hybrid, T 1000": {
        "schedule": "log_snr", "log_snr_first": 8, "log_snr_last": -8, "timesteps": 1000, **LEARNED
    },
}  # fmt: skip
BATCH, TIMESTEPS, TERMS, IMAGES, READ = 64, 400, 80, 177, 20_000


def measured(splits: Splits, settings: dict[str, Any], steps: int, channels: int) -> dict[str, Any]:
    """Trains with these settings. Returns the bound with both decoders, in bits/dim, and the CPU minutes of training.

    Args:
        settings: fields of DiffusionConfig.
        steps: optimizer steps.
        channels: `model_channels` of the network.
    """
    config = TrainConfig(
        data="", output="", batch_size=BATCH, steps=steps,
        model=ModelConfig(channels, (1, 2), attention_resolutions=(4,), class_conditional=True),
        diffusion=DiffusionConfig(**{"timesteps": TIMESTEPS, **settings}),
        optimizer=OptimizerConfig(learning_rate=1e-3, ema_decays=(0.998,)),
    )  # fmt: skip
    index, held_out, cpu = splits["train"], splits["validation"], torch.device("cpu")
    images, labels = read_images(index, np.arange(index.rows))
    spec, began = make_spec(config, index), time.process_time()
    state = new_state(config, spec, cpu)
    stream = batches(index, images, labels, range(steps), config.seed, BATCH)
    loop.train(config, spec, state, state.model, stream, Meter(config, 1, cpu), loop.Observer())
    minutes = (time.process_time() - began) / 60
    for parameter, average in zip(state.model.parameters(), state.averages[0], strict=True):
        parameter.data.copy_(average)
    ids = np.arange(min(held_out.rows, IMAGES))
    bits = held_out_bits(
        state.model.eval(), spec, held_out, ids, terms=TERMS, occurs=values_that_occur(index)
    )
    assert bits.softmax is not None
    found = {
        "bits_per_dim": bits.bits_per_dim, "L_0": bits.decoder, "L_T": bits.prior,
        "softmax": bits.softmax[0], "softmax_stderr": bits.softmax[1], "L_0_softmax": bits.softmax[2],
    }  # fmt: skip
    return {name: round(value, 4) for name, value in found.items()} | {"cpu_minutes": round(minutes, 1)}


def main(data: str, steps: int, cases: list[str], channels: int, folder: Path) -> None:
    """Prints a line for the codes and one for each case."""
    source, place, size = SOURCES[data]
    size = {"mnist": 28}.get(data, size)
    prepare(PrepareConfig(output=str(folder), source=source, input=place, image_size=size))  # type: ignore[arg-type]
    splits = open_splits(str(folder))
    train, images = (
        read_images(index, np.arange(min(index.rows, most)))[0].permute(0, 2, 3, 1).numpy()
        for index, most in ((splits["train"], READ), (splits["validation"], IMAGES))
    )
    codes = {name: round(value, 4) for name, value in trivial_codes(train, images).items()}
    print(json.dumps({"data": data, "codes": codes}), flush=True)
    for name in cases:
        row = measured(splits, CASES[name], steps, channels)
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
