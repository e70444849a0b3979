"""Adapts a model to the hardware: arithmetic, compilation, DDP. Plain torch, no Ray."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import memory
from pipeline.config import TrainConfig
from pipeline.gpu.precision import use_tf32


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """True if the forward pass runs in bf16. `precision="auto"` chooses bf16 if the hardware multiplies it.

    Without that, bf16 is emulated and several times slower than fp32.
    """
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Older releases of torch do not have this function.
        instructions: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(bool(instructions.get(name)) for name in ("amx_bf16", "avx512_bf16"))
    return False


def prepare_device(config: TrainConfig, device: torch.device) -> None:
    """Sets up a worker's device.

    A GPU gets cuDNN's fastest convolutions, and TF32 if the run uses bf16. A CPU worker gets as many threads as it
    reserves CPUs. Either keeps freed memory (`pipeline.memory`): batches of images come and go at every step.
    """
    memory.keep()
    if device.type == "cuda":
        # TF32 rounds products more coarsely, so a run in fp32 does not use it.
        use_tf32(uses_bf16(config, device))
        torch.backends.cudnn.benchmark = True  # shapes stay the same: cuDNN tries its algorithms once
    else:
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))


def wrap(config: TrainConfig, model: nn.Module, world_size: int, device: torch.device) -> nn.Module:
    """The model in the form that a training step calls: compiled if asked for, and with DDP for several CPU workers.

    On GPUs `step.make_backward` sums the workers' gradients after a CUDA graph. DDP's hooks would rule out the graph,
    and launching its kernels one by one can take several times as long as running them. The result shares its
    parameters with `model`, which keeps its own names.
    """
    network = model
    if config.compile:
        # One program for each batch size; a worker has at most a few. torch keeps programs on disk (in
        # TORCHINDUCTOR_CACHE_DIR), so a node's workers, restarts and later runs reuse them.
        network = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    if world_size > 1 and device.type == "cpu":
        network = DistributedDataParallel(
            network,
            gradient_as_bucket_view=True,
            # Buffers are constants and equal on all workers.
            broadcast_buffers=False,
            # DDP refuses a static graph if gradients are accumulated without being exchanged.
            static_graph=not config.microbatch,
        )
    return network
