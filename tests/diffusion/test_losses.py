"""Each training objective against its definition."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import DiffusionConfig
from pipeline.diffusion.losses import check_loss, training_loss, vlb_coefficient, vlb_term
from pipeline.diffusion.process import Process, q_sample, snr
from pipeline.errors import InputError
from tests.diffusion.common import Chain, gaussian, joint, process_of

DATA = gaussian()


def blurred(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """Return an epsilon that is neither optimal nor zero."""
    return (x_t + 0.1 * t.reshape(-1, 1, 1, 1)).tanh()


def batch(process: Process) -> tuple[Tensor, Tensor, Tensor]:
    x_0, (noise,) = joint(DATA, 1)
    return x_0, 1 + torch.arange(len(x_0)) % (len(process) - 1), noise


def test_the_simple_loss_is_the_mean_squared_error_of_epsilon() -> None:
    process = process_of()
    x_0, t, noise = batch(process)
    loss = training_loss(process, DiffusionConfig(), blurred, x_0, t, noise)
    eps = blurred(q_sample(process, x_0, t, noise), t, None)
    torch.testing.assert_close(loss, ((eps - noise) ** 2).mean(dim=(1, 2, 3)))


def test_the_model_is_told_the_step_of_the_original_chain() -> None:
    told = list[Tensor]()

    def model(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        told.append(t)
        return x_t

    process = process_of()
    x_0, t, noise = batch(process)
    training_loss(process, DiffusionConfig(), model, x_0, t, noise)
    torch.testing.assert_close(told[0], t)


def test_the_weighted_loss_is_the_bound_where_the_variance_is_that_of_the_posterior() -> None:
    """With sigma^2 = beta-tilde each image's KL is the coefficient times its squared error."""
    process = process_of(variance="fixed_small")
    x_0, t, noise = batch(process)
    x_t = q_sample(process, x_0, t, noise)
    bound = vlb_term(process, blurred(x_t, t, None), x_0, x_t, t, clip=False)
    loss = training_loss(process, DiffusionConfig(loss="weighted"), blurred, x_0, t, noise)
    torch.testing.assert_close(loss, len(process) * bound)
    vlb = training_loss(process, DiffusionConfig(loss="vlb"), blurred, x_0, t, noise)
    torch.testing.assert_close(vlb, len(process) * bound)


def test_the_weighted_loss_misses_only_a_constant_of_the_bound_where_the_variance_is_beta() -> None:
    process = process_of(variance="fixed_large")
    x_0, t, noise = batch(process)
    vlb, weighted = (
        training_loss(process, DiffusionConfig(loss=kind), blurred, x_0, t, noise)
        for kind in ("vlb", "weighted")
    )
    chain = Chain(process.beta.numpy())
    ratio = chain.beta_tilde[1:] / chain.beta[1:]
    constant = len(process) * 0.5 * (ratio - 1 - np.log(ratio)) / math.log(2)
    torch.testing.assert_close(vlb - weighted, torch.from_numpy(constant)[t - 1])


def test_the_coefficient_is_that_of_equation_12() -> None:
    process = process_of(variance="fixed_large")
    chain = Chain(process.beta.numpy())
    expected = chain.beta / (2 * (1 - chain.beta) * (1 - chain.alpha_bar))
    np.testing.assert_allclose(vlb_coefficient(process)[1:], expected[1:], rtol=1e-12)


def test_min_snr_limits_the_weight_of_the_clean_steps_only() -> None:
    process = process_of(timesteps=40)
    x_0, t, noise = batch(process)
    simple, limited = (
        training_loss(process, DiffusionConfig(loss=kind, min_snr_gamma=5.0), blurred, x_0, t, noise)
        for kind in ("simple", "min_snr")
    )
    alpha_bar = Chain(process.beta.numpy()).alpha_bar
    ratio = torch.from_numpy(alpha_bar / (1 - alpha_bar))
    torch.testing.assert_close(ratio, snr(process))
    torch.testing.assert_close(limited, simple * (ratio.clamp(max=5) / ratio)[t])
    assert (limited[ratio[t] <= 5] == simple[ratio[t] <= 5]).all()


def test_in_the_hybrid_loss_the_bound_trains_the_variance_and_nothing_else() -> None:
    process = process_of(variance="learned_range")
    x_0, t, noise = batch(process)
    mean = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    spread = torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)

    def model(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return torch.cat([mean * x_t, spread * torch.ones_like(x_t)], dim=1)

    def gradients(kind: str) -> list[Tensor]:
        if kind == "simple":
            loss = (noise - mean * q_sample(process, x_0, t, noise)).square().mean()
            return list(torch.autograd.grad(loss, [mean]))
        config = DiffusionConfig(loss=kind, variance="learned_range", vlb_weight=0.01)  # type: ignore[arg-type]
        loss = training_loss(process, config, model, x_0, t, noise).mean()
        return list(torch.autograd.grad(loss, [mean, spread]))

    hybrid, vlb, (simple,) = gradients("hybrid"), gradients("vlb"), gradients("simple")
    torch.testing.assert_close(hybrid[0], simple)
    torch.testing.assert_close(hybrid[1], 0.01 * vlb[1])
    assert vlb[0].abs() > 1e-3  # the bound without the stop-gradient trains the mean


@pytest.mark.parametrize("kind", ["simple", "weighted", "min_snr"])
def test_a_learned_variance_that_the_loss_would_not_train_is_refused(kind: str) -> None:
    with pytest.raises(InputError, match="use hybrid or vlb"):
        check_loss(DiffusionConfig(loss=kind, variance="learned_range"))  # type: ignore[arg-type]


def test_the_hybrid_loss_without_a_learned_variance_is_refused() -> None:
    with pytest.raises(InputError, match="use simple"):
        check_loss(DiffusionConfig(loss="hybrid"))
