"""Compares our training step with the same step around diffusers' UNet2DModel: ratios and a roofline from one run.

    python -m benchmarks.train_step [--network NAME] [--compile ours|both] [--threads N] [--smoke]

The networks are those of `benchmarks.networks`. diffusers' UNet2DModel with that configuration has the same weights as
ours. Batches have 32 images on a CPU, 128 on a GPU (64 for images of 64x64). Each step draws timesteps and noise, runs
forward and backward, clips, and updates Adam and the weight average. Both networks are measured in fp32, and in bf16 if
the hardware multiplies it. Theirs is also measured in channels_last. --compile adds torch.compile of ours, or of both
(theirs on a GPU with CUDA graphs).

Ours and theirs run in separate processes, because ours keeps freed memory (`pipeline.memory`). All contenders take turns,
and only one process works at a time. `images_per_second` uses the clock (medians), `images_per_cpu_second` uses CPU time
(the least of all rounds). If other work shares the machine, use --threads 1 and compare the latter.

`share_of_convolution_peak` divides the FLOP/s of the UNet's convolutions and products (counted on diffusers' graph,
forward and backward) by those of a 3x3 convolution of 128 channels at 32x32, in our best precision. `mfu` divides them by
those of a large matrix product. `sample_…` is images/s by DDIM, with our sampler and with diffusers' DDIMPipeline.

On a CPU `products` is the share of a call's time that its convolutions, matrix products and attention take, by torch's
profiler. `limits` are the ratios that our calls would reach if nothing else in them took any time.
"""

import argparse
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.networks import NETWORKS, in_memory
from pipeline.config import ModelConfig, ModelSpec, Precision, TrainConfig
from pipeline.diffusion.process import make_process
from pipeline.gpu.graph import Graphed
from pipeline.models.diffusers import unet_config
from pipeline.models.ema import Averages
from pipeline.models.sampling import sample_images
from pipeline.models.unet import build
from pipeline.training import flops, network
from pipeline.training.state import new_state
from pipeline.training.step import Prepared, backward, make_backward, train_step

# Operations of torch that multiply matrices.
PRODUCTS = re.compile("conv|addmm|::mm$|bmm|scaled_dot_product")


class Plan(NamedTuple):
    """The measurements to make. `compiled` names the sides that are also measured compiled."""

    spec: ModelSpec
    batch: int
    threads: int
    precisions: list[Precision]
    compiled: tuple[str, ...]
    sampling_steps: int

    def config(self, precision: Precision, compile: bool = False) -> TrainConfig:
        """The settings of a contender."""
        return TrainConfig(
            "", "", batch_size=self.batch, steps=10_000, precision=precision, compile=compile,
            cpus_per_worker=self.threads,
        )  # fmt: skip


class Theirs(nn.Module):
    """diffusers' network with our model's signature, in a given memory layout."""

    def __init__(self, spec: ModelSpec, layout: torch.memory_format) -> None:
        super().__init__()
        self.unet = UNet2DModel.from_config(unet_config(spec)).to(memory_format=layout)
        self.layout = layout

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        sample: Tensor = self.unet(x.contiguous(memory_format=self.layout), t).sample
        return sample


def stepper(
    config: TrainConfig, spec: ModelSpec, device: torch.device, model: nn.Module | None
) -> Callable[[], int]:
    """Returns a function that makes one step on a CPU, or six on a GPU, and returns their number.

    Args:
        model: the network to train; None = ours.
    """
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

    def steps() -> int:
        for _ in range(count):
            outcome = train_step(config, spec, state, run_backward, next(batches), device)
        outcome.loss.item()
        return count

    return steps


def sampler(side: str, plan: Plan, device: torch.device, precision: Precision) -> Callable[[], int]:
    """Returns a function that draws a batch of images by DDIM, with our sampler or with diffusers'."""
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    if side == "ours":
        model = build(plan.spec).to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        called = Graphed(model) if device.type == "cuda" else model
        ids = torch.arange(plan.batch, device=device)

        def sample() -> None:
            sample_images(called, plan.spec, ids, sampler="ddim", sampling_steps=plan.sampling_steps).cpu()
    else:
        unet = UNet2DModel.from_config(unet_config(plan.spec)).eval().to(device)
        pipe = DDIMPipeline(unet, DDIMScheduler(1000))
        pipe.set_progress_bar_config(disable=True)

        def sample() -> None:
            pipe(plan.batch, num_inference_steps=plan.sampling_steps, output_type="np")

    def run() -> int:
        with bf16:
            sample()
        return 1

    return run


def share_of_products(run: Callable[[], int]) -> float:
    """The share of a call's time on the CPU that operations take which multiply matrices, forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return float(sum(time for name, time in times.items() if PRODUCTS.search(name)) / sum(times.values()))


def contenders(side: str, plan: Plan, device: torch.device) -> dict[str, Callable[[], int]]:
    """The functions to time of one side, by name: training steps and samples."""

    def theirs(channels_last: bool = False) -> Theirs | None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return Theirs(plan.spec, layout) if side == "diffusers" else None

    best = plan.config(plan.precisions[-1])
    jobs = {f"{p}": stepper(plan.config(p), plan.spec, device, theirs()) for p in plan.precisions}
    if side == "diffusers":
        jobs["channels_last"] = stepper(best, plan.spec, device, theirs(channels_last=True))
    if side in plan.compiled:
        compiled = plan.config(plan.precisions[-1], compile=True)
        jobs["compiled"] = stepper(compiled, plan.spec, device, theirs(channels_last=device.type == "cuda"))
    return jobs | {f"sample_{p}": sampler(side, plan, device, p) for p in plan.precisions}


def serve(calls: Connection, side: str, plan: Plan) -> None:
    """The process of one side. Runs each function that it is called for, and answers with clock and CPU seconds.

    After an empty name it answers with the share of products in each function, and ends.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if side == "ours" or device.type == "cuda":
        network.prepare_device(plan.config(plan.precisions[-1]), device)
    torch.set_num_threads(plan.threads)
    jobs = contenders(side, plan, device)
    calls.send(list(jobs))
    while name := calls.recv():
        clock, cpu = time.perf_counter(), time.process_time()
        count = jobs[name]()
        calls.send(((time.perf_counter() - clock) / count, (time.process_time() - cpu) / count))
    on_cpu = device.type == "cpu"
    calls.send({name: share_of_products(run) for name, run in jobs.items()} if on_cpu else {})


def flops_per_image(spec: ModelSpec) -> float:
    """Floating-point operations of diffusers' network per image, forward and backward; a multiply-add counts as two."""
    model = UNet2DModel.from_config(unet_config(spec))
    image = spec.image
    with FlopCounterMode(display=False) as counter:
        x = torch.randn(1, image.channels, image.size, image.size)
        model(x, torch.zeros(1, dtype=torch.int64)).sample.sum().backward()
    return float(counter.get_total_flops())


@torch.no_grad()
def convolution_peak(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    """Yields FLOP/s of a 3x3 convolution, 128 to 128 channels at 32x32, batch 32, channels_last."""
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


def take_turns(
    plan: Plan, rounds: int, warm_ups: int, peaks: Iterator[float]
) -> tuple[dict[str, float], dict[str, float], float, dict[str, float]]:
    """Images per second and per CPU second of every contender, the median FLOP/s of the convolution, shares of products.

    Args:
        rounds: timed rounds.
        warm_ups: rounds before them.
        peaks: result of `convolution_peak`.
    """
    sides = dict[str, Connection]()
    for side in ("ours", "diffusers"):
        sides[side], other = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        context.Process(target=serve, args=(other, side, plan), daemon=True).start()
    names = [(side, name) for side, calls in sides.items() for name in calls.recv()]
    times, peak = dict[str, list[tuple[float, float]]](), list[float]()
    for turn in range(warm_ups + rounds):
        peak.append(next(peaks))
        for side, name in names:
            sides[side].send(name)
            seconds = sides[side].recv()
            if turn >= warm_ups:
                times.setdefault(f"{side}_{name}", []).append(seconds)
    shares = dict[str, float]()
    for side, calls in sides.items():
        calls.send("")
        shares |= {f"{side}_{name}": share for name, share in calls.recv().items()}
    clock = {name: plan.batch / statistics.median(c for c, _ in values) for name, values in times.items()}
    cpu = {name: plan.batch / min(c for _, c in values) for name, values in times.items()}
    return clock, cpu, statistics.median(peak[warm_ups:]), shares


def limits(rate: dict[str, float], shares: dict[str, float]) -> dict[str, float]:
    """What `ratios` would be if nothing but the products of our calls took any time."""
    bare = {name: value / shares[name] if name.startswith("ours_") else value for name, value in rate.items()}
    return ratios(bare)


def ratios(rate: dict[str, float]) -> dict[str, float]:
    """Our rates divided by theirs, for equal measurements and for the best training step of each side."""
    names = [name.removeprefix("ours_") for name in rate if name.startswith("ours_")]
    result = {
        name: rate[f"ours_{name}"] / rate[f"diffusers_{name}"]
        for name in names
        if f"diffusers_{name}" in rate
    }
    trained = {name: value for name, value in rate.items() if "_sample_" not in name}
    best, other = (
        max(v for name, v in trained.items() if name.startswith(side)) for side in ("ours", "diffusers")
    )
    result |= {"best": best / other, "best_to_diffusers_fp32": best / rate["diffusers_fp32"]}
    return {name: round(value, 3) for name, value in result.items()}


def main(smoke: bool, name: str, compiled: str, threads: int, rounds: int) -> dict[str, object]:
    """Runs all measurements. Returns the result that is printed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    spec, batch, warm_ups = NETWORKS[name], 32, 2
    if device.type == "cuda":
        batch = (
            64 if spec.image.size > 32 else 128
        )  # our graph is recorded at the fourth step, in the warm-up
    if smoke:
        spec = ModelSpec(ModelConfig(32, (1, 2), res_blocks=1), spec.image, spec.diffusion)
        batch, rounds, warm_ups = 4, 1, 1
    bf16 = network.uses_bf16(TrainConfig("", ""), device)
    sides = {"": (), "ours": ("ours",), "both": ("ours", "diffusers")}[compiled]
    plan = Plan(spec, batch, threads, ["fp32", "bf16"] if bf16 else ["fp32"], sides, 2 if smoke else 5)
    peaks = convolution_peak(device, torch.bfloat16 if bf16 else torch.float32)
    clock, cpu, peak, shares = take_turns(plan, rounds, warm_ups, peaks)
    best = max(v for n, v in clock.items() if n.startswith("ours_") and "_sample_" not in n)
    each = flops_per_image(spec)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} threads"
    result: dict[str, object] = {
        "device": where,
        "hardware_bf16": bf16,
        "images_per_second": {name: round(value, 2) for name, value in clock.items()},
        "ratios": ratios(clock),
    }
    if device.type == "cpu":
        result["images_per_cpu_second"] = {name: round(value, 2) for name, value in cpu.items()}
        result["ratios_by_cpu_time"] = ratios(cpu)
        result["products"] = {name: round(share, 3) for name, share in shares.items()}
        result["limits"] = limits(clock, shares)
    return result | {
        "gflop_per_image": round(each / 1e9, 2),
        "convolution_peak_tflops": round(peak / 1e12, 3),
        "share_of_convolution_peak": round(best * each / peak, 3),
        "mfu": round(best * each / flops.peak_flops(device, bf16), 3),
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
        help="also measure torch.compile, which takes minutes the first time",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--smoke", action="store_true", help="run one round of a small network")
    options = parser.parse_args()
    print(json.dumps(main(options.smoke, options.network, options.compile, options.threads, options.rounds)))
