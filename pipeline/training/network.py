"""How a model runs on the hardware at hand: arithmetic, compilation, workers. Plain torch, no Ray."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import memory
from pipeline.config import TrainConfig
from pipeline.gpu.precision import use_tf32


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether the forward pass runs in bf16: as told, or where the hardware multiplies bf16 itself.

    Elsewhere bf16 is emulated, and several times slower than fp32.
    """
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Older torch can't tell.
        instructions: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(bool(instructions.get(name)) for name in ("amx_bf16", "avx512_bf16"))
    return False


def prepare_device(config: TrainConfig, device: torch.device) -> None:
    """TF32 on a GPU beside bf16, and the fastest convolutions; a CPU's reserved threads, and memory that is kept."""
    if device.type == "cuda":
        # Who asks for fp32 gets no rounder products.
        use_tf32(uses_bf16(config, device))
        torch.backends.cudnn.benchmark = True  # shapes stay the same: cuDNN tries its algorithms once
    else:
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))
        memory.keep()


def wrap(config: TrainConfig, model: nn.Module, world_size: int, device: torch.device) -> nn.Module:
    """The model as a training step calls it: compiled where asked for, and on CPUs DDP for several workers.

    On GPUs `step.make_backward` adds the workers' gradients up, after a CUDA graph: DDP's hooks would keep the step
    from being one, and launching its kernels one by one can take several times as long as they run.
    It shares its parameters with `model`, whose names stay as they were.
    """
    network = model
    if config.compile:
        # A program for each batch size, of which a worker has at most a few. torch keeps programs on disk (in
        # TORCHINDUCTOR_CACHE_DIR): workers of a node, restarts and later runs find them there.
        network = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    if world_size > 1 and device.type == "cpu":
        network = DistributedDataParallel(
            network,
            gradient_as_bucket_view=True,
            # Buffers are constants, alike on all workers.
            broadcast_buffers=False,
            # Of no use, and refused, where gradients are accumulated without being exchanged.
            static_graph=not config.microbatch,
        )
    return network
