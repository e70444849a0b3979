"""The arithmetic of a training step, the speed of a worker's device, and the utilisation of its node."""

import contextlib
import time

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import ModelSpec
from pipeline.models.unet import build

MEASURED_SECONDS = 0.2
SIDE = {"cpu": 512, "cuda": 8192}
MEGABYTE = 1e6


def flops_per_image(spec: ModelSpec) -> int:
    """Floating-point operations of one image's forward and backward pass; a multiply-add counts as two.

    They are counted on torch's meta device, so nothing is computed.
    """
    with torch.device("meta"):
        model = build(spec)
        x = torch.empty(1, spec.image.channels, spec.image.size, spec.image.size)
        t = torch.zeros(1, dtype=torch.int64)
        labels = torch.zeros(1, dtype=torch.int64) if spec.model.class_conditional else None
        with FlopCounterMode(display=False) as counter:
            model(x, t, labels).sum().backward()
    return int(counter.get_total_flops())


@torch.no_grad()
def peak_flops(device: torch.device, bf16: bool) -> float:
    """Floating-point operations per second of a square matrix product on this device, measured for about 0.2 s."""
    side = SIDE.get(device.type, 512)
    a = torch.ones(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)

    def seconds() -> float:
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    first = seconds()  # makes the kernels ready
    tries = [seconds() for _ in range(max(2, min(100, int(MEASURED_SECONDS / first))))]
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
