"""Attention's own backward pass, against float64 and against torch's."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec
from pipeline.models import attention
from pipeline.models.unet import build

BF16_EPSILON = 2**-7


def exact_attention(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(256, 4, 32), (64, 3, 32), (49, 2, 16), (1, 1, 8)])
def test_gradients_in_bf16_are_exact_to_its_rounding(
    tokens: int, heads: int, width: int, spread: float
) -> None:
    torch.manual_seed(0)
    qkv = (spread * torch.randn(3, tokens, 3 * heads * width)).bfloat16().requires_grad_()
    d_out = torch.randn(3, tokens, heads * width).bfloat16()
    out = attention.self_attention(qkv, heads)
    (gradient,) = torch.autograd.grad(out, qkv, d_out)
    double = qkv.detach().double().requires_grad_()
    wanted_out = exact_attention(double, heads)
    (wanted,) = torch.autograd.grad(wanted_out, double, d_out.double())
    assert (out - wanted_out).norm() < BF16_EPSILON * wanted_out.norm()
    assert (gradient - wanted).norm() < BF16_EPSILON * wanted.norm()


def test_tiles_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(5, 20, 3 * 32).bfloat16().requires_grad_()
    gradients = []
    for elements in (1, 3 * 400, 2**21):
        monkeypatch.setattr(attention, "TILE_ELEMENTS", elements)
        out = attention.self_attention(qkv, 2)
        gradients += torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in pairwise(gradients))


def test_a_networks_gradient_is_as_near_to_float64_as_with_torchs_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = build(ModelSpec(ModelConfig(32, (1, 2), 1, (16, 8)), ImageConfig(16, 3), DiffusionConfig()))
    for parameter in model.parameters():  # many weights start at zero and would block gradients
        nn.init.normal_(parameter, std=0.1)
    x, target, t = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16), torch.arange(8) * 100

    def gradient(bf16: bool) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.mse_loss(model(x.to(next(model.parameters()).dtype), t), target)
        loss.backward()
        return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])  # type: ignore[union-attr]

    own = gradient(bf16=True)
    monkeypatch.setattr(attention, "MOST_TOKENS", 0)
    torchs = gradient(bf16=True)
    model.double()
    exact = gradient(bf16=False)
    assert not torch.equal(own, torchs)
    assert (own - exact).norm() <= 1.05 * (torchs - exact).norm()
