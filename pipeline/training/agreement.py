"""All workers stop at the same step, whichever of them is told to."""

import torch
import torch.distributed as dist


class Agreement:
    """A switch that any worker throws and that all see thrown at the same step.

    Each step's answer is on its way while the step is made: asking costs the steps nothing. On a process group of
    its own over gloo, so that a GPU has nothing to wait for.
    """

    def __init__(self, world_size: int) -> None:
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._flag = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None

    def __call__(self, thrown_here: bool) -> bool:
        """Whether any worker threw it at the previous step; every worker calls it once a step."""
        if self._group is None:
            return thrown_here
        if self._work is not None:
            self._work.wait()
            if self._flag.item():
                return True
        self._flag.fill_(int(thrown_here))
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        return False
