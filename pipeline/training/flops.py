"""The arithmetic of a training step, the speed of a worker's device, and the utilisation of its node."""

import contextlib
import time

import psutil
import torch
from torch import nn

from pipeline.models.unet import Attention, UNet

MEASURED_SECONDS = 0.2
SIDE = {"cpu": 512, "cuda": 8192}
MEGABYTE = 1e6


def flops_per_image(model: UNet, size: int) -> int:
    """Floating-point operations of one image of `size` pixels a side, forward and backward; a multiply-add counts as two.

    Counts matrix products and convolutions from the shapes of their weights. torch's own counter would import modules for
    two seconds, before the first step of a run.
    """
    last = len(model.down_blocks) - 1
    blocks = [(block, size >> level) for level, block in enumerate(model.down_blocks)]
    blocks += [(model.mid_block, size >> last)]
    blocks += [(block, size >> (last - level)) for level, block in enumerate(model.up_blocks)]
    forward = (
        _products(model.conv_in, size) + _products(model.conv_out, size) + _products(model.time_embedding, 1)
    )
    for block, side in blocks:
        attentions = [layer for layer in block.modules() if isinstance(layer, Attention)]
        forward += _products(block, side) + sum(4 * side**4 * layer.to_q.in_features for layer in attentions)
    # The backward pass has two products for each one, but nobody needs the gradient of the image. What attention computes
    # again there does not count.
    return 3 * forward - _products(model.conv_in, size)


def _products(module: nn.Module, side: int) -> int:
    """Operations of the convolutions and linear layers of a block at a resolution, forward."""
    total = 0
    for name, weight in module.named_parameters():
        if weight.dim() > 1:
            # Upsampling multiplies 4x4 taps with every pixel, in place of a 3x3 kernel.
            scale = 1 / 4 if "downsamplers" in name else 16 / 9 if "upsamplers" in name else 1
            pixels = 1 if "time_emb_proj" in name else side**2
            total += round(2 * weight.numel() * pixels * scale)
    return total


@torch.no_grad()
def peak_flops(device: torch.device, bf16: bool) -> float:
    """Floating-point operations per second of a square matrix product on this device, measured for about 0.2 s."""
    side = SIDE.get(device.type, 512)
    # Random numbers, because a GPU multiplies equal ones faster. The generator leaves torch's own as it was.
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if bf16 else torch.float32
    a = torch.rand(side, side, device=device, dtype=dtype, generator=generator)

    def seconds() -> float:
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    seconds()  # makes the kernels ready
    # An idle GPU needs some of this time to raise its clocks.
    tries, end = [seconds(), seconds()], time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < end:
        tries.append(seconds())
    return 2 * side**3 / min(tries)  # the fastest, because other work may share the machine


def utilisation(device: torch.device) -> dict[str, float]:
    """Utilisation of this node, this process and the worker's GPU, by the names of MLflow's system metrics.

    Percentages and megabytes. The CPU's percentage is the mean since the last call.
    """
    memory = psutil.virtual_memory()
    figures = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_memory_megabytes": psutil.Process().memory_info().rss / MEGABYTE,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        busy = 0.0
        with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # needs nvidia-ml-py
            busy = float(torch.cuda.utilization(device))
        figures |= {
            "system/gpu_utilization_percentage": busy,
            "system/gpu_memory_usage_percentage": 100 * (1 - free / total),
            "system/gpu_memory_usage_megabytes": (total - free) / MEGABYTE,
        }
    return figures
