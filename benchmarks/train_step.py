"""Our training step against the same step around diffusers' UNet2DModel: ratios and a roofline from one run.

    python -m benchmarks.train_step [--network unet|cifar|imagenet_64] [--compile ours|both] [--smoke]

The networks are those of `benchmarks.networks`; diffusers' UNet2DModel of that configuration shares ours weight for
weight. Batches of 32 on a CPU, and of 128 on a GPU (64 for images of 64x64). Each step draws timesteps and noise, goes
forward and backward, clips, and updates Adam and the weight average. All contenders take turns, medians are compared.
Besides fp32 (and bf16, where the hardware multiplies it), each is measured at its best: the machine's own precision,
channels_last, and torch.compile with --compile (of ours, or of both; on a GPU theirs with its CUDA graphs).

`share_of_convolution_peak` sets the UNet's convolutions and products (counted on diffusers' graph, forward and
backward) against what a 3x3 convolution of 128 channels at 32x32 reaches here, at the precision that is our best; `mfu`
against a large matrix product. `sampling` is images/s by DDIM, of our sampler over diffusers' DDIMPipeline.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.networks import NETWORKS, in_memory
from pipeline.config import ModelConfig, ModelSpec, TrainConfig
from pipeline.diffusion.process import make_process
from pipeline.gpu.graph import Graphed
from pipeline.models.diffusers import unet_config
from pipeline.models.ema import Averages
from pipeline.models.sampling import sample_images
from pipeline.models.unet import build
from pipeline.training import flops, network
from pipeline.training.state import new_state
from pipeline.training.step import Prepared, backward, make_backward, train_step


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
    """A function that makes a step of `model` or of ours, on a GPU six, and returns the seconds of one."""
    state = new_state(config, spec, device)
    if model is None:
        run_backward = make_backward(config, spec, network.wrap(config, state.model, 1, device), device)
    else:
        state.model = model.to(device)  # type: ignore[assignment]
        state.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        state.ema = Averages(list(model.parameters()), 1)
        mode = "reduce-overhead" if device.type == "cuda" else None
        called = torch.compile(model, dynamic=False, mode=mode) if config.compile else model
        process = make_process(spec.diffusion).to(device)

        def run_backward(data: Prepared) -> Tensor:
            return backward(config, spec, process, called, data)  # type: ignore[arg-type]

    batches = in_memory(config, spec.image)
    state.model.train()

    count = 6 if device.type == "cuda" else 1  # a loop does not wait for a GPU after each step

    def steps() -> float:
        began = time.perf_counter()
        for _ in range(count):
            outcome = train_step(config, spec, state, run_backward, next(batches), device)
        outcome.loss.item()
        return (time.perf_counter() - began) / count

    return steps


def samplers(
    spec: ModelSpec, device: torch.device, bf16: bool, count: int, steps: int
) -> list[Callable[[], object]]:
    """Our sampler and diffusers', each making `count` images by DDIM."""
    ours = build(spec).to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    called = Graphed(ours) if device.type == "cuda" else ours
    pipe = DDIMPipeline(UNet2DModel.from_config(unet_config(spec)).eval().to(device), DDIMScheduler(1000))
    pipe.set_progress_bar_config(disable=True)
    ids = torch.arange(count, device=device)

    def precision() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def our_side() -> object:
        with precision():
            return sample_images(called, spec, ids, sampler="ddim", sampling_steps=steps).cpu()

    def their_side() -> object:
        with precision():
            return pipe(count, num_inference_steps=steps, output_type="np").images

    return [our_side, their_side]


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


def main(smoke: bool, name: str, compiled: str) -> dict[str, object]:
    """Runs all; returns what is printed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec, batch, rounds, warm_ups = NETWORKS[name], 32, 5, 2
    if device.type == "cuda":
        # Our graph is recorded at the fourth step.
        batch, rounds, warm_ups = 64 if spec.image.size > 32 else 128, 5, 2
    if smoke:
        spec = ModelSpec(ModelConfig(32, (1, 2), res_blocks=1), spec.image, spec.diffusion)
        batch, rounds, warm_ups = 4, 1, 1

    def settings(precision: str, compile: bool = False) -> TrainConfig:
        return TrainConfig("", "", batch_size=batch, steps=10_000, precision=precision, compile=compile)  # type: ignore[arg-type]

    def theirs(channels_last: bool = False) -> Theirs:
        return Theirs(spec, torch.channels_last if channels_last else torch.contiguous_format)

    if device.type == "cuda":
        network.prepare_device(settings("auto"), device)
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
    sides = samplers(spec, device, bf16, batch, 2 if smoke else 10)
    peaks = convolution_peak(device, torch.bfloat16 if bf16 else torch.float32)
    for step in steps.values():
        for _ in range(warm_ups):
            step()
    for side in sides:
        side()
    seconds = {name: list[float]() for name in steps}
    sampling = [list[float](), list[float]()]
    peak = list[float]()
    for _ in range(rounds):
        peak.append(next(peaks))
        for name, step in steps.items():
            seconds[name].append(step())
    for _ in range(min(rounds, 5)):
        for side, values in zip(sides, sampling, strict=True):
            began = time.perf_counter()
            side()
            values.append(time.perf_counter() - began)
    rate = {name: batch / statistics.median(values) for name, values in seconds.items()}
    best = {
        side: max(v for name, v in rate.items() if name.startswith(side)) for side in ("ours", "diffusers")
    }
    each = flops_per_image(spec)
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "hardware_bf16": bf16,
        "images_per_second": {name: round(value, 2) for name, value in rate.items()},
    }
    result |= {f"ratio_{n}": round(rate[f"ours_{n}"] / rate[f"diffusers_{n}"], 3) for n in contenders}
    ours, other = (batch / statistics.median(values) for values in sampling)
    return result | {
        "ratio_best": round(best["ours"] / best["diffusers"], 3),
        "ratio_best_to_diffusers_fp32": round(best["ours"] / rate["diffusers_fp32"], 3),
        "gflop_per_image": round(each / 1e9, 2),
        "convolution_peak_tflops": round(statistics.median(peak) / 1e12, 3),
        "share_of_convolution_peak": round(best["ours"] * each / statistics.median(peak), 3),
        "mfu": round(best["ours"] * each / flops.peak_flops(device, bf16), 3),
        "sampling": {"ours": round(ours, 2), "diffusers": round(other, 2), "ratio": round(ours / other, 3)},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=list(NETWORKS), default="unet")
    parser.add_argument(
        "--compile",
        choices=["", "ours", "both"],
        default="",
        help="torch.compile too; minutes the first time",
    )
    parser.add_argument("--smoke", action="store_true", help="a small network and one round: does it run?")
    options = parser.parse_args()
    print(json.dumps(main(options.smoke, options.network, options.compile)))
