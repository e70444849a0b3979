"""Makes all workers obey a command at the same step, whichever of them receives it."""

import torch
import torch.distributed as dist

from pipeline.training.run_channel import Command


class Agreement:
    """Passes a command that one worker received to all workers, for the same step.

    The command is exchanged while a step is computed, so it costs no time. It has its own gloo process group, so
    no GPU waits for it.

    Args:
        world_size: number of workers.
    """

    def __init__(self, world_size: int) -> None:
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._command = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None

    def __call__(self, here: Command) -> Command:
        """Returns the strongest command that any worker received one step ago; a single worker gets `here`.

        Every worker calls it once a step.

        Args:
            here: command that this worker received.
        """
        if self._group is None:
            return here
        if self._work is not None:
            self._work.wait()
        agreed = Command(int(self._command))
        self._command = torch.tensor(int(here), dtype=torch.int32)
        self._work = dist.all_reduce(self._command, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed
