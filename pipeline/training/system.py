"""How busy a worker's machine is, under the names by which MLflow shows system metrics."""

import contextlib

import psutil
import torch

MEGABYTE = 1e6


def utilisation(device: torch.device) -> dict[str, float]:
    """Of this node and process, and of the worker's GPU; the CPU's share is the mean since the last call."""
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
