"""Tests that need a GPU: its kernels, CUDA graphs, and training and random numbers that equal a CPU's."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batch import Batch
from pipeline.gpu import available
from pipeline.gpu.graph import Graphed
from pipeline.rng import Purpose, bits, normal, uniforms
from pipeline.training import loop
from pipeline.training.meter import Meter
from pipeline.training.state import new_state
from tests.training.common import batches, problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

IDS = torch.tensor([7, 2**40 + 3, 0, 99, 12345678901])
EPOCHS = torch.tensor([1, 2, 2**24 - 1, 0, 5])


def test_averages_in_main_memory_are_those_on_the_gpu() -> None:
    config, spec = problem(steps=20)
    options = dataclasses.replace(config.optimizer, ema_decays=(0.9, 0.99), ema_lengths=(0.1,))
    ends = {}
    for place in ("worker", "cpu"):
        where = dataclasses.replace(config, optimizer=dataclasses.replace(options, ema_device=place))
        device = torch.device("cuda")
        state, meter = new_state(where, spec, device), Meter(where, 1, device)
        loop.train(where, spec, state, state.model, batches(where), meter, loop.Observer())
        assert {t.device.type for average in state.averages for t in average} == {
            "cuda" if place == "worker" else "cpu"
        }
        ends[place] = [t.cpu() for average in state.averages for t in average]
    torch.testing.assert_close(ends["worker"], ends["cpu"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 5, 16, 2**63 + 12345, -3])
def test_a_gpu_draws_the_same_words(seed: int) -> None:
    assert available.work()
    for purpose in (Purpose.NOISE, Purpose.TIMESTEP, Purpose.FLIP):
        theirs = bits(seed, EPOCHS.cuda(), IDS.cuda(), purpose, 13)
        assert torch.equal(theirs.cpu(), bits(seed, EPOCHS, IDS, purpose, 13))
    purposes = (Purpose.FLIP, Purpose.TIMESTEP)
    theirs_all, mine = (
        uniforms(seed, EPOCHS.cuda(), IDS.cuda(), purposes),
        uniforms(seed, EPOCHS, IDS, purposes),
    )
    assert all(torch.equal(theirs_all[purpose].cpu(), mine[purpose]) for purpose in purposes)


def test_normal_numbers_agree_to_a_unit_in_the_last_place() -> None:
    ids = torch.arange(2000)
    theirs = normal(3, 1, ids.cuda(), Purpose.NOISE, (3, 32, 32)).cpu()
    mine = normal(3, 1, ids, Purpose.NOISE, (3, 32, 32))
    assert (theirs.view(torch.int32).long() - mine.view(torch.int32).long()).abs().max() <= 1


@pytest.mark.parametrize(
    ("channels", "size", "groups"), [(128, 32, 32), (384, 16, 32), (640, 64, 32), (192, 5, 16)]
)
def test_group_norm_in_bf16_is_nearer_to_the_exact_one_than_torchs(
    channels: int, size: int, groups: int
) -> None:
    from pipeline.gpu import norm

    torch.manual_seed(0)
    x = (2 * torch.randn(2, channels, size, size, device="cuda") + 0.7).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, device="cuda").unbind()
    modulation, dy = torch.randn(2, 2 * channels, device="cuda").bfloat16(), torch.randn_like(x)
    before = torch.randn(channels, device="cuda")

    def torchs(x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor, before: Tensor) -> Tensor:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        h = x + before.to(x.dtype)[:, None, None]
        h = F.group_norm(h, groups, weight.to(x.dtype), bias.to(x.dtype), 1e-5)
        return F.silu(h * (1 + scale) + shift)

    def kernel(x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor, before: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=1)
        return norm.group_norm(x, weight, bias, scale, shift, groups, 1e-5, True, before)

    inputs = [x, weight, bias, modulation, before]
    exact = _with_gradients(torchs, [value.double() for value in inputs], dy.double())
    mine, theirs = _with_gradients(kernel, inputs, dy), _with_gradients(torchs, inputs, dy)
    for a, b, wanted in zip(mine, theirs, exact, strict=True):
        assert (a - wanted).norm() <= (b - wanted).norm()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"microbatch": 3},
        {"diffusion": {"timestep_sampler": "loss_second_moment"}},
        {"skip_nonfinite": True, "poisoned": True},
        {"poisoned": True},
    ],
)
def test_a_run_is_that_of_a_cpu(changes: dict[str, Any]) -> None:
    torch.backends.cudnn.allow_tf32 = False
    cpu, gpu = _run("cpu", changes), _run("cuda", changes)
    assert gpu.step == cpu.step
    assert gpu.told == cpu.told
    for step, figures in cpu.figures.items():
        assert gpu.figures[step]["loss"] == pytest.approx(figures["loss"], rel=1e-4)
        assert gpu.figures[step]["skipped_steps"] == figures["skipped_steps"]
    assert (gpu.weights - cpu.weights).norm() < 1e-3 * cpu.weights.norm()


def test_a_graph_gives_what_the_function_gives_for_every_shape() -> None:
    weight = torch.randn(4, 4, device="cuda", requires_grad=True)

    def run(x: Tensor, y: Tensor | None) -> Tensor:
        loss = (x @ weight).square().sum(1)
        loss.sum().backward()
        return loss.detach()

    graphed = Graphed(run, [weight])
    for i in range(8):
        x = torch.randn(3 if i != 6 else 5, 4, device="cuda")
        weight.grad = None
        loss = graphed(x, None)
        gradient = weight.grad.clone()
        weight.grad = None
        assert torch.allclose(loss, run(x, None))
        assert torch.allclose(gradient, weight.grad)


@dataclasses.dataclass
class Ended:
    step: int
    weights: Tensor
    figures: dict[int, dict[str, float]]
    told: list[tuple[int, list[float]]]


class _Recorder(loop.Observer):
    def __init__(self) -> None:
        self.figures: dict[int, dict[str, float]] = {}
        self.told: list[tuple[int, list[float]]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.figures[step] = metrics

    def skipped(self, error: loop.NonFinite) -> None:
        self.told.append((error.step, [sample["id"] for sample in error.samples]))


def _run(device: str, changes: dict[str, Any]) -> Ended:
    options = {name: dict(value) if isinstance(value, dict) else value for name, value in changes.items()}
    poisoned = options.pop("poisoned", False)
    config, spec = problem(steps=30, log_every=10, **options)
    state, observer = new_state(config, spec, torch.device(device)), _Recorder()

    def stream() -> Iterator[Batch]:
        for i, batch in enumerate(batches(config)):
            weights = batch.weights * float("nan") if poisoned and i == 12 else batch.weights
            yield dataclasses.replace(batch, weights=weights)

    try:
        meter = Meter(config, 1, torch.device(device))
        loop.train(config, spec, state, state.model, stream(), meter, observer)
    except loop.NonFinite as error:
        observer.skipped(error)
        # On a GPU the loop learns of a bad step one step later.
        state.step = error.step
    weights = torch.cat([p.detach().flatten().cpu() for p in state.model.parameters()])
    if observer.told and not config.skip_nonfinite:
        weights = torch.ones(1)
    return Ended(state.step, weights, observer.figures, observer.told)


def _with_gradients(function: Any, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [tensor.clone(memory_format=torch.preserve_format).requires_grad_() for tensor in inputs]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, dy)]
