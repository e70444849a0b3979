"""One worker's loop: the same trajectory for any number of workers, in any microbatch, after a resume."""

import dataclasses
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.training import checkpoint, loop
from pipeline.training.loop import NonFinite, new_state, train
from tests.training.common import MemoryBatch, batches, problem

CPU = torch.device("cpu")


def run(config, spec, state=None, rank: int = 0, world_size: int = 1):  # type: ignore[no-untyped-def]
    """Trains to the end; returns the state and the logged losses."""
    state = state or new_state(config, spec, CPU)
    model = state.model
    if world_size > 1:
        model = DistributedDataParallel(model)
    losses: dict[int, float] = {}
    stream = batches(config, rank, world_size, state.step)
    train(
        config,
        spec,
        state,
        model,
        stream,
        CPU,
        world_size,
        lambda s, m: losses.update({s: m["loss"]}),
        lambda s: None,
    )
    return state, losses


def flat(state: loop.TrainState) -> Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def _one_rank(rank: int, world_size: int, port: int, folder: str, changes: dict[str, object]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    config, spec = problem(**changes)
    state, losses = run(config, spec, rank=rank, world_size=world_size)
    if rank == 0:
        torch.save(
            {"weights": flat(state), "losses": losses, "sampler": state.sampler}, f"{folder}/{world_size}.pt"
        )
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize("world_size", [2, 4])
def test_fifty_steps_of_several_workers_are_those_of_one(world_size: int, tmp_path: Path) -> None:
    changes: dict[str, object] = {"steps": 50, "diffusion": {"timestep_sampler": "loss_second_moment"}}
    mp.start_processes(
        _one_rank, (world_size, _free_port(), str(tmp_path), changes), world_size, start_method="spawn"
    )
    several = torch.load(tmp_path / f"{world_size}.pt", weights_only=True)
    config, spec = problem(**dict(changes))
    one, losses = run(config, spec)
    assert (several["weights"] - flat(one)).norm() < 1e-4 * flat(one).norm()
    assert several["losses"] == pytest.approx(losses, rel=1e-4)
    assert torch.equal(several["sampler"]["count"], one.sampler["count"])


def test_microbatches_accumulate_to_the_same_step() -> None:
    whole, _ = run(*problem())
    pieces, _ = run(*problem(microbatch=3))
    assert (flat(whole) - flat(pieces)).norm() < 1e-4 * flat(whole).norm()


@pytest.mark.parametrize("sampler", ["uniform", "loss_second_moment"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(sampler: str, tmp_path: Path) -> None:
    config, spec = problem(diffusion={"timestep_sampler": sampler})
    straight, losses = run(config, spec)
    half, _ = run(dataclasses.replace(config, steps=10), spec)
    checkpoint.write(str(tmp_path), checkpoint.capture(half), {})
    torch.randn(100)  # hidden generator state differs after a restart; nothing may depend on it
    resumed = new_state(config, spec, CPU)
    checkpoint.restore(resumed, checkpoint.read(str(tmp_path))[0])
    resumed, tail = run(config, spec, resumed)
    assert torch.equal(flat(straight), flat(resumed))
    assert all(
        torch.equal(a, b)
        for x, y in zip(straight.averages, resumed.averages, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert tail == {step: loss for step, loss in losses.items() if step > 10}


def test_training_lowers_the_loss() -> None:
    _, losses = run(*problem(steps=100))
    assert losses[100] < 0.8 * losses[5]


class _Poisoned:
    """A stream whose third batch can't give a finite loss."""

    def __init__(self, config) -> None:  # type: ignore[no-untyped-def]
        self._batches, self._count = batches(config), 0

    def __next__(self) -> MemoryBatch:
        batch, self._count = next(self._batches), self._count + 1
        return dataclasses.replace(batch, weights=batch.weights * float("nan")) if self._count == 3 else batch

    def __iter__(self) -> "_Poisoned":
        return self


def test_a_non_finite_step_is_named_and_leaves_the_weights_as_they_were() -> None:
    config, spec = problem()
    state = new_state(config, spec, CPU)
    with pytest.raises(NonFinite, match=r"step 3: .*samples \d+"):
        train(config, spec, state, state.model, _Poisoned(config), CPU, 1, lambda *_: None, lambda _: None)
    before, _ = run(dataclasses.replace(config, steps=2), spec)
    assert torch.equal(flat(state), flat(before))


def test_a_non_finite_step_is_skipped_on_request() -> None:
    config, spec = problem(skip_nonfinite=True)
    state = new_state(config, spec, CPU)
    train(config, spec, state, state.model, _Poisoned(config), CPU, 1, lambda *_: None, lambda _: None)
    assert state.step == config.steps
    assert bool(flat(state).isfinite().all())
