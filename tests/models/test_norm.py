"""Group norm in bf16 and channels_last: values and gradients against torch's in float64."""

import pytest
import torch

from pipeline.models.norm import MANY_PIXELS, GroupNorm


def outcome(norm, x, dy):
    """Return the output and the gradients of x, weight and bias."""
    x = x.detach().requires_grad_()
    norm.zero_grad()
    y = norm(x)
    y.backward(dy)
    return y.detach(), x.grad, norm.weight.grad, norm.bias.grad


@pytest.mark.parametrize("size", [4, 16, 32])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_bf16_in_channels_last_agrees_with_float64_to_the_rounding_of_bf16(size, offset):
    assert (size * size >= MANY_PIXELS) == (size == 32), "both forward paths are tried"
    torch.manual_seed(0)
    norm = GroupNorm(32, 96)
    with torch.no_grad():
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_()
    shape = (3, 96, size, size)
    x, dy = (
        torch.randn(shape).add(shift).bfloat16().contiguous(memory_format=torch.channels_last)
        for shift in (offset, 0.0)
    )
    ours = outcome(norm, x, dy)
    reference = torch.nn.GroupNorm(32, 96).double()
    reference.load_state_dict({name: value.double() for name, value in norm.state_dict().items()})
    exact = outcome(reference, x.double(), dy.double())
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    for got, want, name in zip(ours, exact, ("y", "dx", "dweight", "dbias"), strict=True):
        error = (got.double() - want).norm() / want.norm()
        # bf16 has 8 bits, so a rounding is up to 0.4 %. If x has an offset, dx is a small difference of large numbers.
        assert error < 0.02, f"{name}: {error:.4f}"


def test_other_precisions_and_layouts_are_torchs_own_bit_for_bit():
    torch.manual_seed(0)
    ours, theirs = GroupNorm(32, 64), torch.nn.GroupNorm(32, 64)
    x = torch.randn(2, 64, 8, 8)
    for images in (x, x.contiguous(memory_format=torch.channels_last), x.double()):
        a, b = ours.to(images.dtype)(images), theirs.to(images.dtype)(images)
        assert torch.equal(a, b)
