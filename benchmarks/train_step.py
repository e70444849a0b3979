"""Our UNet's training step against diffusers' UNet2DModel of the same structure: ratios from one run.

    python benchmarks/train_step.py [--smoke]

32x32x3, batch 32, forward, mean squared error, backward, Adam; the two take turns, medians are compared.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DModel

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec
from pipeline.models.diffusers import unet_config
from pipeline.models.unet import build

SPEC = ModelSpec(ModelConfig(), ImageConfig(32, 3), DiffusionConfig())


def stepper(model: torch.nn.Module, batch: int, bf16: bool, channels_last: bool) -> Callable[[], float]:
    """A function that does one step and returns its seconds."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    x, noise = (torch.randn(batch, 3, 32, 32).to(memory_format=layout) for _ in range(2))
    t = torch.randint(0, 1000, (batch,))

    def step() -> float:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(x, t)
            eps = output if isinstance(output, torch.Tensor) else output.sample
            loss = (eps - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    return step


def main(smoke: bool) -> None:
    """Prints one JSON line: images/s of each, and ratios."""
    batch, rounds = (4, 1) if smoke else (32, 5)
    theirs = unet_config(SPEC)
    steps = {
        "diffusers_fp32": stepper(UNet2DModel.from_config(theirs), batch, False, False),
        "ours_fp32": stepper(build(SPEC), batch, False, True),
        "diffusers_bf16": stepper(UNet2DModel.from_config(theirs), batch, True, False),
        "ours_bf16": stepper(build(SPEC), batch, True, True),
    }
    for step in steps.values():
        step()
    seconds = {name: list[float]() for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(step())
    rate = {name: batch / statistics.median(values) for name, values in seconds.items()}
    result = {f"{name}_images_per_second": round(value, 2) for name, value in rate.items()}
    result |= {
        "ratio_fp32": round(rate["ours_fp32"] / rate["diffusers_fp32"], 3),
        "ratio_bf16": round(rate["ours_bf16"] / rate["diffusers_bf16"], 3),
        "ratio_best_to_diffusers_fp32": round(rate["ours_bf16"] / rate["diffusers_fp32"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main("--smoke" in sys.argv)
