"""Our training step against the same step around diffusers' UNet2DModel: ratios and a roofline from one run.

    python -m benchmarks.train_step [--compile ours|both] [--smoke]

The network has improved-diffusion's shape (64 channels, multipliers 1,2,2, two residual blocks, attention at 16x16,
6.95 M parameters), which diffusers' UNet2DModel of that configuration shares weight for weight; 32x32x3, batch 32.
Each step draws timesteps and noise, goes forward and backward, clips, and updates Adam and the weight average. All
contenders take turns, medians are compared. Besides fp32 (and bf16, where the hardware multiplies it), each is
measured at its best: the machine's own precision, channels_last, and torch.compile with --compile (of ours, or of both).

`share_of_convolution_peak` sets the UNet's convolutions and products (counted on diffusers' graph, forward and
backward) against what a 3x3 convolution of 128 channels at 32x32 reaches here, at the precision that is our best.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import UNET, in_memory
from pipeline.config import ModelConfig, ModelSpec, TrainConfig
from pipeline.diffusion.process import make_process
from pipeline.models.diffusers import unet_config
from pipeline.training import loop, network


class Theirs(nn.Module):
    """diffusers' network under our model's signature, in the memory layout that it was given."""

    def __init__(self, spec: ModelSpec, layout: torch.memory_format) -> None:
        super().__init__()
        self.unet = UNet2DModel.from_config(unet_config(spec)).to(memory_format=layout)
        self.layout = layout

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        sample: Tensor = self.unet(x.contiguous(memory_format=self.layout), t).sample
        return sample


def stepper(
    config: TrainConfig, spec: ModelSpec, device: torch.device, model: nn.Module | None
) -> Callable[[], float]:
    """A function that makes one step, of `model` or of ours, and returns its seconds."""
    state = loop.new_state(config, spec, device)
    if model is not None:
        state.model = model.to(device)  # type: ignore[assignment]
        state.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        state.averages = [[p.detach().clone() for p in model.parameters()]]
    called = network.wrap(config, state.model, 1)
    process = make_process(spec.diffusion).to(device)
    batches = in_memory(config, spec.image)
    state.model.train()

    def step() -> float:
        began = time.perf_counter()
        loss, _ = loop.train_step(config, spec, process, state, called, next(batches), device)
        loss.item()
        return time.perf_counter() - began

    return step


def flops_per_image(spec: ModelSpec) -> float:
    """Of diffusers' network, forward and backward: a multiplication and an addition are two."""
    model = UNet2DModel.from_config(unet_config(spec))
    image = spec.image
    with FlopCounterMode(display=False) as counter:
        x = torch.randn(1, image.channels, image.size, image.size)
        model(x, torch.zeros(1, dtype=torch.int64)).sample.sum().backward()
    return float(counter.get_total_flops())


@torch.no_grad()
def convolution_peak(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    """FLOP/s of a 3x3 convolution, 128 to 128 channels at 32x32, batch 32, channels_last: one value a turn."""
    convolution = nn.Conv2d(128, 128, 3, padding=1).to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(32, 128, 32, 32, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    flops = 2 * 9 * 128 * 128 * 32 * 32 * 32
    repeats = 3 if device.type == "cpu" else 100
    while True:
        convolution(x).sum().item()
        began = time.perf_counter()
        for _ in range(repeats):
            y = convolution(x)
        y[0, 0, 0, 0].item()
        yield repeats * flops / (time.perf_counter() - began)


def main(smoke: bool, compiled: str) -> dict[str, object]:
    """Runs all; returns what is printed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, rounds, warm_ups = (4, 1, 1) if smoke else (32, 5, 2)
    model = ModelConfig(32, (1, 2), res_blocks=1) if smoke else UNET.model
    spec = ModelSpec(model, UNET.image, UNET.diffusion)

    def settings(precision: str, compile: bool = False) -> TrainConfig:
        return TrainConfig("", "", batch_size=batch, steps=10_000, precision=precision, compile=compile)  # type: ignore[arg-type]

    def theirs(channels_last: bool = False) -> Theirs:
        return Theirs(spec, torch.channels_last if channels_last else torch.contiguous_format)

    bf16 = network.uses_bf16(settings("auto"), device)
    contenders = {"fp32": settings("fp32")} | ({"bf16": settings("bf16")} if bf16 else {})
    steps = {f"ours_{name}": stepper(c, spec, device, None) for name, c in contenders.items()}
    steps |= {f"diffusers_{name}": stepper(c, spec, device, theirs()) for name, c in contenders.items()}
    steps["diffusers_channels_last"] = stepper(settings("auto"), spec, device, theirs(channels_last=True))
    if compiled:
        steps["ours_compiled"] = stepper(settings("auto", True), spec, device, None)
    if compiled == "both":
        steps["diffusers_compiled"] = stepper(
            settings("auto", True), spec, device, theirs(channels_last=True)
        )
    peaks = convolution_peak(device, torch.bfloat16 if bf16 else torch.float32)
    for step in steps.values():
        for _ in range(warm_ups):
            step()
    seconds = {name: list[float]() for name in steps}
    peak = list[float]()
    for _ in range(rounds):
        peak.append(next(peaks))
        for name, step in steps.items():
            seconds[name].append(step())
    rate = {name: batch / statistics.median(values) for name, values in seconds.items()}
    best = {
        side: max(v for name, v in rate.items() if name.startswith(side)) for side in ("ours", "diffusers")
    }
    flops = flops_per_image(spec)
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "hardware_bf16": bf16,
        "images_per_second": {name: round(value, 2) for name, value in rate.items()},
    }
    result |= {f"ratio_{n}": round(rate[f"ours_{n}"] / rate[f"diffusers_{n}"], 3) for n in contenders}
    return result | {
        "ratio_best": round(best["ours"] / best["diffusers"], 3),
        "ratio_best_to_diffusers_fp32": round(best["ours"] / rate["diffusers_fp32"], 3),
        "gflop_per_image": round(flops / 1e9, 2),
        "convolution_peak_tflops": round(statistics.median(peak) / 1e12, 3),
        "share_of_convolution_peak": round(best["ours"] * flops / statistics.median(peak), 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compile",
        choices=["", "ours", "both"],
        default="",
        help="torch.compile too; minutes the first time",
    )
    parser.add_argument("--smoke", action="store_true", help="a small network and one round: does it run?")
    options = parser.parse_args()
    print(json.dumps(main(options.smoke, options.compile)))
