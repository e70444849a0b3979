"""Counts the kernels that a GPU starts in a training step, without a GPU.

    python -m benchmarks.kernels [--smoke]

A step runs on torch's "meta" device, which has shapes but no values. The benchmark counts every operation that would
start a kernel, for `prepare`, which draws a batch's noise, and for the whole step. An operation that waits for a value of
the device (`.item()`, a copy to the CPU) fails on "meta", so a completed step waits for nothing. The step runs in fp32,
so the casts of autocast are not counted, nor are the few kernels of the optimizer. Needs Triton, but no GPU.
"""

import argparse
import json
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.networks import UNET, in_memory
from pipeline.config import ImageConfig, ModelConfig, ModelSpec, TrainConfig
from pipeline.gpu import available
from pipeline.training.state import new_state
from pipeline.training.step import make_backward, prepare, train_step

# Operations that start no kernel: they only make views or allocate memory.
NO_KERNEL = {
    "view", "_unsafe_view", "expand", "select", "slice", "unsqueeze", "squeeze", "permute", "transpose", "t", "detach",
    "alias", "as_strided", "split", "split_with_sizes", "unbind", "empty", "empty_like", "new_empty", "unfold",
}  # fmt: skip


class Kernels(TorchDispatchMode):
    """Counts the operations that start at least one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in NO_KERNEL:
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


def main(smoke: bool) -> dict[str, object]:
    """Returns the counts of `prepare`, of the step, and of its most frequent operations."""
    available.work = lambda: True  # type: ignore[assignment]
    spec = (
        ModelSpec(ModelConfig(32, (1, 2), res_blocks=1), ImageConfig(32, 3), UNET.diffusion)
        if smoke
        else UNET
    )
    config = TrainConfig("", "", batch_size=4 if smoke else 128, steps=10, precision="fp32", random_flip=True)
    device = torch.device("meta")
    state = new_state(config, spec, device)
    run_backward = make_backward(config, spec, state.model, device)
    batches = in_memory(config, spec.image)
    # torch's fused optimizer needs a real device. It starts only a few kernels for all parameters.
    state.optimizer.step = lambda: None  # type: ignore[method-assign,assignment,return-value]
    with Kernels() as preparing:
        prepare(config, spec, state.timestep_table(device), next(batches), device)
    with Kernels() as step:
        train_step(config, spec, state, run_backward, next(batches), device)
    return {
        "prepare": sum(preparing.count.values()),
        "step": sum(step.count.values()),
        "most": dict(step.count.most_common(8)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="count for a small network")
    print(json.dumps(main(parser.parse_args().smoke)))
