"""Triton's kernels without a GPU: interpreted, against torch."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipeline.rng import Purpose, bits, normal

pytest.importorskip("triton")
from pipeline.gpu import bias, norm, philox

# tests/conftest.py makes Triton interpret them if there is no GPU.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: see test_on_a_gpu.py")

IDS = torch.tensor([7, 2**40 + 3, 0, 99])
EPOCHS = torch.tensor([1, 2, 2**24 - 1, 0])


@pytest.mark.parametrize("seed", [0, 1, 5, 2**63 + 12345, -3])
def test_the_words_are_those_of_the_tensors(seed: int) -> None:
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    purposes = [Purpose.TIMESTEP, Purpose.FLIP, Purpose.LABEL_DROP]
    words = philox.words(key, IDS, EPOCHS, torch.tensor(purposes), 10)
    for column, purpose in enumerate(purposes):
        assert torch.equal(words[:, column], bits(seed, EPOCHS, IDS, purpose, 10))


@pytest.mark.parametrize("count", [1, 7, 192, 3072])
def test_normal_numbers_agree_to_a_unit_in_the_last_place(count: int) -> None:
    mine = philox.normal([5, 0], IDS, EPOCHS, int(Purpose.NOISE), count)
    theirs = normal(5, EPOCHS, IDS, Purpose.NOISE, (count,))
    assert (mine.view(torch.int32) - theirs.view(torch.int32)).abs().max() <= 1


# N, C, H, W, groups, modulated, SiLU, a bias before
NORMS = {
    "modulated": (2, 64, 8, 8, 16, True, True, True),
    "uneven": (2, 48, 5, 7, 4, True, True, True),
    "groups of twelve": (1, 192, 4, 4, 16, False, True, True),
    "of attention": (2, 32, 16, 16, 8, False, False, False),
    "one image": (1, 12, 3, 3, 3, True, False, False),
    "in turns": (1, 36, 20, 20, 3, True, True, True),
}


@pytest.mark.parametrize("shape", NORMS.values(), ids=NORMS.keys())
def test_group_norm_and_its_gradients(shape: tuple[Any, ...]) -> None:
    n, channels, height, width, groups, modulated, silu, biased = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    x = (2 * random(n, channels, height, width) + 0.7).contiguous(memory_format=torch.channels_last)
    inputs = [x, random(channels), random(channels)]
    inputs += [random(channels)] if biased else []
    inputs += [random(n, 2 * channels)] if modulated else []
    dy = random(n, channels, height, width)

    def reference(x: Any, weight: Any, bias: Any, *rest: Any) -> torch.Tensor:
        before, modulation = parts(*rest)
        h = x if before is None else x + before[:, None, None]
        h = F.group_norm(h, groups, weight, bias, 1e-5)
        if modulation is not None:
            scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return F.silu(h) if silu else h

    def kernel(x: Any, weight: Any, bias: Any, *rest: Any) -> torch.Tensor:
        before, modulation = parts(*rest)
        scale, shift = (None, None) if modulation is None else modulation.chunk(2, dim=1)
        return norm.group_norm(x, weight, bias, scale, shift, groups, 1e-5, silu, before)

    def parts(*rest: Any) -> tuple[Any, Any]:
        return rest[0] if biased else None, rest[-1] if modulated else None

    mine, exact = (
        _with_gradients(kernel, inputs, dy),
        _with_gradients(reference, _double(inputs), dy.double()),
    )
    for value, wanted in zip(mine, exact, strict=True):
        assert (value - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize(("channels", "residual"), [(64, True), (100, False), (3, True)])
def test_bias_and_residual_and_their_gradients(channels: int, residual: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, channels, 9, 8)
    inputs = [
        torch.randn(size, generator=generator)
        for size in (shape, (channels,), *([shape] if residual else []))
    ]
    dy = torch.randn(shape, generator=generator)

    def reference(x: Any, b: Any, r: Any = 0) -> torch.Tensor:
        return x + b[:, None, None] + r

    def kernel(x: Any, b: Any, r: Any = None) -> torch.Tensor:
        return bias.add_bias(x, b, r)

    mine, exact = (
        _with_gradients(kernel, inputs, dy),
        _with_gradients(reference, _double(inputs), dy.double()),
    )
    for value, wanted in zip(mine, exact, strict=True):
        assert (value - wanted).norm() < 1e-6 * wanted.norm()


def _double(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.double() for tensor in tensors]


def _with_gradients(function: Any, inputs: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.clone(memory_format=torch.preserve_format).requires_grad_() for tensor in inputs]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, dy)]
