"""Rungs inside one Ray Train run: at each, the workers measure, and training waits for Ray Tune's decision.

Workers are started once for each trial, so a measurement costs its own time and one message, but no start.
"""

import asyncio
import copy
import time
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.train.collective import broadcast_from_rank_zero
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import ModelSpec
from pipeline.models.unet import UNet
from pipeline.training.state import TrainState
from pipeline.tuning.ledger import Rung
from pipeline.tuning.objective import Objective, over_ranks


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Exchange:
    """Carries questions from a trial's rank 0, which asks whether to continue, to the trial, which answers.

    A restarted worker asks about the same rung again and gets the same answer. A restarted process of this actor
    remembers nothing: Ray then repeats the pending question, and the trial answers as often as it is asked.
    """

    def __init__(self) -> None:
        self._asked: asyncio.Queue[Rung] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[bool]] = {}

    async def ask(self, rung: Rung) -> bool:
        """Asks about a rung and waits for the answer: True = continue."""
        if rung.step not in self._answers:
            self._asked.put_nowait(rung)
        return await asyncio.shield(self._answer_to(rung.step))

    async def next(self, timeout: float) -> Rung | None:
        """The next rung without an answer; None if there is none within `timeout` seconds."""
        try:
            rung = await asyncio.wait_for(self._asked.get(), timeout)
        except TimeoutError:
            return None
        return None if self._answer_to(rung.step).done() else rung

    async def answer(self, step: int, go_on: bool) -> None:
        """Answers for the rung at `step`: True lets the workers continue, False ends the run. The first answer counts."""
        if not (answer := self._answer_to(step)).done():
            answer.set_result(go_on)

    def _answer_to(self, step: int) -> asyncio.Future[bool]:
        return self._answers.setdefault(step, asyncio.get_running_loop().create_future())


def open_exchange() -> Any:
    """Starts an exchange on the trial's own node, so that it lives as long as the trial, even if other nodes die."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Exchange.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class RungWatch:
    """A `training.worker.Watch` that measures the averaged weights at the rungs.

    Attributes:
        rungs: the rung's images, by optimizer step.
        batch_size: images in each step.
        known: measurements from before an interruption, by step. The question is asked again, since the answer may
            have been lost, but nothing is measured again.
    """

    rungs: dict[int, int]
    batch_size: int
    known: dict[int, Rung]
    spec: ModelSpec
    objective: Objective
    exchange: Any

    def __call__(self, state: TrainState, rank: int, world_size: int) -> bool:
        """See `Watch`."""
        if state.step not in self.rungs:
            return False
        rung = self.known.get(state.step)
        if rung is None:
            device = next(state.model.parameters()).device
            found = self.objective(averaged_model(state), self.spec, over_ranks(device, rank, world_size))
            rung = Rung(
                images=self.rungs[state.step],
                seen=state.step * self.batch_size,
                step=state.step,
                time=time.time(),
                metrics=found.metrics,
                per_image=found.per_image,
            )
        go_on = rank != 0 or ray.get(self.exchange.ask.remote(rung))
        if world_size > 1:
            go_on = broadcast_from_rank_zero(go_on)
        return not go_on


def averaged_model(state: TrainState) -> UNet:
    """A copy of the model with the averaged weights that would be exported."""
    model = copy.deepcopy(state.model)
    with torch.no_grad():
        for parameter, average in zip(model.parameters(), state.averages[0], strict=True):
            parameter.copy_(average)
    return model.eval().requires_grad_(False)
