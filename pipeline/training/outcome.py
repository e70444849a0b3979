"""What a training step leaves on the device, and how to look at it without holding a GPU up. Plain torch, no Ray."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.batch import Batch


@dataclass(frozen=True)
class Outcome:
    """What a step came to, on the device: nothing has waited for it yet.

    Attributes:
        loss: the local part of the global mean loss; 0 where the step was skipped.
        norm: the global gradient norm before clipping; 0 where the step was skipped.
        finite: whether the step was made; alike on all workers.
        t, losses: of each local sample.
    """

    step: int
    batch: Batch
    loss: Tensor
    norm: Tensor
    finite: Tensor
    t: Tensor
    losses: Tensor


def look_later(flag: Tensor) -> Callable[[], bool]:
    """A look at a flag on the device that waits for no work queued after this call."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    copied = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def look() -> bool:
        event.synchronize()
        return bool(copied)

    return look
