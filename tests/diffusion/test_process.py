"""The forward chain, its posterior and the reverse variances against Bayes' rule and closed forms."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from pipeline.diffusion.process import (
    model_log_variance,
    p_mean_variance,
    posterior_mean_from_eps,
    predict_eps,
    predict_x_0,
    q_mean_variance,
    q_posterior,
    q_sample,
    q_step,
    respace,
    spaced_timesteps,
)
from pipeline.errors import InputError
from tests.diffusion.common import Chain, all_at, gaussian, image, joint, moments, process_of, sigma_points


def test_the_chain_step_by_step_has_the_moments_of_the_closed_form() -> None:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, not abar_t x_0 + (1 - abar_t) eps."""
    data, process = gaussian(), process_of(timesteps=10)
    x, noises = joint(data, len(process))
    for t, noise in enumerate(noises):
        x = q_step(process, x, all_at(x, t), noise)
        mean, covariance = moments(data, x)
        alpha_bar = Chain(process.beta.numpy()).alpha_bar[t]
        np.testing.assert_allclose(
            mean, np.sqrt(alpha_bar) * data.along_axes(data.mean[None])[0], rtol=1e-9, atol=1e-12
        )
        expected = np.diag(alpha_bar * data.variances.numpy() + 1 - alpha_bar)
        np.testing.assert_allclose(covariance, expected, rtol=1e-9, atol=1e-9)


def test_merged_noise_is_scaled_by_the_root_of_the_summed_variances() -> None:
    """Two steps add noise of variance s1^2 + s2^2, that is sqrt(s1^2 + s2^2) eps with a unit normal eps."""
    process = process_of(timesteps=2)
    z = sigma_points(2)
    x = image(torch.zeros(len(z), 1, dtype=torch.float64))
    for t in range(2):
        x = q_step(process, x, all_at(x, t), image(z[:, t : t + 1]))
    (b1, b2) = process.beta.tolist()
    assert x.square().mean().item() == pytest.approx((1 - b2) * b1 + b2, rel=1e-12)
    assert x.square().mean().item() == pytest.approx(1 - process.alpha_bar[1].item(), rel=1e-12)


@pytest.mark.parametrize("t", [0, 1, 5, 11])
def test_one_draw_in_closed_form_has_the_stated_mean_and_variance(t: int) -> None:
    process = process_of()
    x_0 = image(torch.tensor([[0.3, -0.8]], dtype=torch.float64))
    z = sigma_points(2)
    draws = q_sample(process, x_0.expand(len(z), -1, -1, -1), all_at(z, t), image(z)).flatten(1)
    stated = q_mean_variance(process, x_0, all_at(x_0, t))
    torch.testing.assert_close(draws.mean(0), stated.mean.flatten())
    torch.testing.assert_close(draws.T.cov(correction=0), stated.variance.flatten().diag())
    torch.testing.assert_close(stated.log_variance, stated.variance.log())
    alpha_bar = Chain(process.beta.numpy()).alpha_bar[t]
    torch.testing.assert_close(stated.mean, alpha_bar**0.5 * x_0)
    torch.testing.assert_close(stated.variance, torch.full_like(x_0, 1 - alpha_bar))


@pytest.mark.parametrize("t", [1, 2, 6, 11])
def test_the_posterior_is_that_of_bayes_rule(t: int) -> None:
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised numerically on a grid."""
    process = process_of()
    beta, chain = process.beta.numpy(), Chain(process.beta.numpy())
    x_0, x_t = 0.4, -0.7
    grid = np.linspace(-8, 8, 400_001)
    prior = norm.pdf(grid, np.sqrt(chain.alpha_bar[t - 1]) * x_0, np.sqrt(1 - chain.alpha_bar[t - 1]))
    weight = prior * norm.pdf(x_t, np.sqrt(1 - beta[t]) * grid, np.sqrt(beta[t]))
    weight /= weight.sum()
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean) ** 2).sum()
    a, b = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (x_0, x_t))
    ours = q_posterior(process, a, b, all_at(a, t))
    assert ours.mean.item() == pytest.approx(mean, rel=1e-6)
    assert ours.variance.item() == pytest.approx(variance, rel=1e-6)
    assert ours.log_variance.item() == pytest.approx(np.log(variance), rel=1e-6)


def test_both_forms_of_the_posterior_mean_agree_at_every_step() -> None:
    """The mean follows from x_0, or from epsilon with a division by sqrt(alpha_t), not alpha_bar_t."""
    process = process_of()
    x_0, (noise,) = joint(gaussian(), 1)
    for t in range(len(process)):
        steps = all_at(x_0, t)
        x_t = q_sample(process, x_0, steps, noise)
        torch.testing.assert_close(
            posterior_mean_from_eps(process, x_t, steps, noise), q_posterior(process, x_0, x_t, steps).mean
        )


def test_x_0_and_epsilon_are_recovered_from_each_other() -> None:
    """x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), not divided by abar_t."""
    process = process_of(timesteps=100)
    x_0, (noise,) = joint(gaussian(), 1)
    steps = torch.arange(len(x_0)) * 9
    x_t = q_sample(process, x_0, steps, noise)
    torch.testing.assert_close(predict_x_0(process, x_t, steps, noise), x_0)
    torch.testing.assert_close(predict_eps(process, x_t, steps, x_0), noise)


def test_variance_kinds_are_beta_beta_tilde_and_between_them_in_log_space() -> None:
    """beta_t and beta-tilde_t are values of sigma_t^2, not of sigma_t."""
    process = process_of(variance="fixed_small")
    chain = Chain(process.beta.numpy())
    small = model_log_variance(process).exp().numpy()
    large = model_log_variance(process_of(variance="fixed_large")).exp().numpy()
    np.testing.assert_allclose(small[1:], chain.beta_tilde[1:], rtol=1e-12)
    np.testing.assert_allclose(large[1:], chain.beta[1:], rtol=1e-12)
    # beta-tilde of the first step is zero, so both kinds use the second step's there.
    assert chain.beta_tilde[0] == 0
    np.testing.assert_allclose([small[0], large[0]], chain.beta_tilde[1], rtol=1e-12)
    learned = process_of(variance="learned_range")
    x = torch.zeros(len(learned), 1, 1, 1, dtype=torch.float64)
    steps = torch.arange(len(learned))
    for v, expected in ((-1.0, small), (1.0, chain.beta), (0.0, np.sqrt(small * chain.beta))):
        output = torch.cat([x, torch.full_like(x, v)], dim=1)
        p = p_mean_variance(learned, output, x, steps, clip=False)
        np.testing.assert_allclose(p.variance.flatten(), expected, rtol=1e-12)
        np.testing.assert_allclose(p.log_variance.flatten(), np.log(expected), rtol=1e-12)
    with pytest.raises(InputError, match="no fixed table"):
        model_log_variance(learned)


def test_clipping_limits_x_0_and_the_mean_follows_from_it() -> None:
    process = process_of()
    x_t = torch.linspace(-3, 3, 7, dtype=torch.float64).reshape(7, 1, 1, 1)
    p = p_mean_variance(process, torch.zeros_like(x_t), x_t, all_at(x_t, 6), clip=True)
    assert p.x_0.abs().max() == 1
    torch.testing.assert_close(p.mean, q_posterior(process, p.x_0, x_t, all_at(x_t, 6)).mean)
    torch.testing.assert_close(predict_x_0(process, x_t, all_at(x_t, 6), p.eps), p.x_0)


def test_a_respaced_chain_keeps_the_marginals_of_the_steps_it_visits() -> None:
    process = process_of(timesteps=100)
    for count in (1, 2, 7, 99, 100):
        steps = spaced_timesteps(100, count)
        short = respace(process, steps)
        assert (len(short), len(set(steps)), steps[-1]) == (count, count, 99)
        torch.testing.assert_close(short.alpha_bar, process.alpha_bar[steps])
        torch.testing.assert_close(torch.cumprod(1 - short.beta, 0), short.alpha_bar)
        assert short.timesteps.tolist() == steps


@pytest.mark.parametrize("steps", [[], [3, 3], [4, 2], [-1, 2], [0, 100]])
def test_steps_that_are_no_subchain_are_refused(steps: list[int]) -> None:
    with pytest.raises(InputError, match="sampling steps"):
        respace(process_of(timesteps=100), steps)


def test_a_model_with_the_wrong_channels_is_named() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(InputError, match="needs 6 channels"):
        p_mean_variance(process_of(variance="learned_range"), x, x, all_at(x, 1), clip=False)
