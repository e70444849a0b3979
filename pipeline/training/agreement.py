"""All workers do as they are told at the same step, whichever of them is told."""

import torch
import torch.distributed as dist

from pipeline.training.run_channel import Command


class Agreement:
    """Tells all workers, at the same step, what one of them was told to do.

    Each step's command is on its way while the step is made: it costs the steps nothing. On a process group of its
    own over gloo, so that a GPU has nothing to wait for.
    """

    def __init__(self, world_size: int) -> None:
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._command = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None

    def __call__(self, here: Command) -> Command:
        """What any worker was told at the step before; every worker calls it once a step."""
        if self._group is None:
            return here
        if self._work is not None:
            self._work.wait()
        agreed = Command(int(self._command))
        self._command = torch.tensor(int(here), dtype=torch.int32)
        self._work = dist.all_reduce(self._command, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed
