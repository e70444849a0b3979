"""The variational bound L_T + sum of L_{t-1} + L_0 against closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from pipeline.config import DiffusionConfig, Variance
from pipeline.diffusion.losses import (
    Model,
    discretized_gaussian_log_likelihood,
    normal_kl,
    prior_bits_per_dim,
    softmax_decoder_bits,
    stratified_vlb,
    training_loss,
    vlb_terms,
)
from pipeline.diffusion.process import Process, make_process, q_sample
from pipeline.errors import InputError
from tests.diffusion.common import Chain, GaussianData, gaussian, joint, mild, pixels, process_of

LN2 = math.log(2)


def terms_of(process: Process, data: GaussianData, v: float | Tensor | None = None) -> np.ndarray:
    """Return L_{t-1} of the optimal epsilon, bits/dim, exact for 0-based t >= 1. L_0 isn't quadratic and is left out."""
    x_0, (noise,) = joint(data, 1)
    optimal = data.optimal_eps(process)

    def model(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        eps = optimal(x_t, t, labels)
        if v is None:
            return eps
        return torch.cat(
            [eps, (torch.as_tensor(v).expand(len(process))[t]).reshape(-1, 1, 1, 1) + 0 * eps], 1
        )

    terms, _ = vlb_terms(process, model, x_0, lambda t: noise, clip=False)
    return terms.mean(0).numpy()[1:]


def closed_terms(chain: Chain, data: GaussianData, sigma2: np.ndarray) -> np.ndarray:
    """Return E KL(q(x_{t-1} | x_t, x_0) || N(mu*, sigma_t^2)), bits/dim, for 0-based t >= 1."""
    coefficient = np.sqrt(chain.alpha_bar_prev) * chain.beta / (1 - chain.alpha_bar)
    mismatch = coefficient[:, None] ** 2 * data.posterior_variance(chain.alpha_bar)
    ratio = (chain.beta_tilde[1:] / sigma2[1:])[:, None]
    kl = 0.5 * (ratio - 1 - np.log(ratio) + mismatch[1:] / sigma2[1:, None])
    return kl.mean(axis=1) / LN2


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_every_term_for_gaussian_data_is_the_closed_form(variance: Variance) -> None:
    data, process = gaussian(), process_of(timesteps=50, variance=variance)
    chain = Chain(process.beta.numpy())
    sigma2 = chain.beta if variance == "fixed_large" else chain.beta_tilde
    np.testing.assert_allclose(terms_of(process, data), closed_terms(chain, data, sigma2), rtol=1e-8)


def test_the_terms_of_a_learned_variance_are_the_closed_form_too() -> None:
    data, process = gaussian(), process_of(timesteps=50, variance="learned_range")
    chain = Chain(process.beta.numpy())
    between = np.concatenate([[1.0], chain.beta_tilde[1:] ** 0.35 * chain.beta[1:] ** 0.65])
    np.testing.assert_allclose(terms_of(process, data, v=0.3), closed_terms(chain, data, between), rtol=1e-8)


def test_the_prior_term_for_gaussian_data_is_the_closed_form() -> None:
    data = gaussian()
    x_0, _ = joint(data, 0)
    mean = data.along_axes(data.mean[None])[0].numpy()
    for process in (process_of(timesteps=10), process_of(timesteps=1000, schedule="cosine")):
        abar = Chain(process.beta.numpy()).alpha_bar[-1]
        power = data.variances.numpy() + mean**2
        closed = 0.5 * (abar * power - abar - np.log1p(-abar)).mean() / LN2
        assert prior_bits_per_dim(process, x_0).mean().item() == pytest.approx(closed, rel=1e-8)


def test_bits_per_dim_of_gaussian_data_is_the_closed_form() -> None:
    """L_0 comes from scipy: x_0 minus its mean given x_1 is normal with a known variance."""
    data = GaussianData(
        torch.tensor([0.1, -0.2], dtype=torch.float64),
        torch.tensor([0.002, 0.02], dtype=torch.float64),
        torch.eye(2, dtype=torch.float64),
    )
    process = process_of(timesteps=25, variance="fixed_large")
    chain = Chain(process.beta.numpy())
    sigma = math.sqrt(chain.beta_tilde[1])
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    # The lower tail, where the difference of two cdfs is accurate.
    rest = -np.abs(nodes[:, None]) * np.sqrt(data.posterior_variance(chain.alpha_bar)[0])
    mass = norm.cdf(rest + 1 / 255, scale=sigma) - norm.cdf(rest - 1 / 255, scale=sigma)
    decoder = (weights[:, None] / weights.sum() * -np.log2(mass)).sum(0).mean()

    z = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 4000, 2)))
    x_0, noise = data.x_t(z[0], 1.0), z[1][:, :, None, None]
    terms, prior = vlb_terms(process, data.optimal_eps(process), x_0, lambda t: noise, clip=False)
    measured = terms[:, 0]
    error = measured.std().item() / math.sqrt(len(measured))
    assert abs(measured.mean().item() - decoder) < 4 * error
    assert error < 0.05 * decoder

    total = terms_of(process, data).sum() + measured.mean().item()
    closed = closed_terms(chain, data, chain.beta).sum() + decoder
    exact_prior = prior_bits_per_dim(process, joint(data, 0)[0]).mean().item()
    assert total == pytest.approx(closed, abs=4 * error)
    # The total is an upper bound of the pixels' entropy, and a close one.
    entropy = 0.5 * np.log2(2 * math.pi * math.e * data.variances.numpy()).mean() - math.log2(2 / 255)
    assert entropy < closed + exact_prior < 1.5 * entropy
    assert (terms.sum(1) + prior).mean().item() == pytest.approx(closed + exact_prior, rel=0.02)


def test_fixed_large_is_optimal_for_unit_gaussian_data() -> None:
    data = GaussianData(*(torch.tensor(v, dtype=torch.float64) for v in ([0.0], [1.0], [[1.0]])))
    large = terms_of(mild("fixed_large"), data)
    small = terms_of(mild("fixed_small"), data)
    assert (large < small).all()
    # q(x_{t-1} | x_t) is normal with variance beta, so the KL is only the information that x_0 adds to x_t.
    chain = Chain(mild("fixed_large").beta.numpy())
    np.testing.assert_allclose(large, 0.5 * np.log2(chain.beta[1:] / chain.beta_tilde[1:]), rtol=1e-8)
    learned = mild("learned_range")
    np.testing.assert_allclose(terms_of(learned, data, v=1.0), large, rtol=1e-9)
    for v in (0.9, 1.1):
        assert (terms_of(learned, data, v=v) > large).all()


def test_fixed_small_is_optimal_for_a_point() -> None:
    data = GaussianData(*(torch.tensor(v, dtype=torch.float64) for v in ([0.3], [0.0], [[1.0]])))
    small = terms_of(mild("fixed_small"), data)
    np.testing.assert_allclose(small, 0, atol=1e-12)
    assert (terms_of(mild("fixed_large"), data) > 1e-4).all()
    learned = mild("learned_range")
    np.testing.assert_allclose(terms_of(learned, data, v=-1.0), 0, atol=1e-12)
    for v in (-0.9, -1.1):
        assert (terms_of(learned, data, v=v) > 1e-6).all()


@pytest.mark.parametrize(("variance", "best"), [(1.0, 1.0), (0.0, -1.0)])
def test_a_learned_variance_finds_the_better_of_both_by_gradient_descent(
    variance: float, best: float
) -> None:
    data = GaussianData(*(torch.tensor(v, dtype=torch.float64) for v in ([0.3], [variance], [[1.0]])))
    process = mild("learned_range")
    x_0, (noise,) = joint(data, 1)
    optimal = data.optimal_eps(process)
    v = torch.zeros(len(process), dtype=torch.float64, requires_grad=True)

    def model(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return torch.cat([optimal(x_t, t, labels), v[t].reshape(-1, 1, 1, 1) + 0 * x_t], dim=1)

    steps = torch.arange(1, len(process)).repeat_interleave(len(x_0))
    images, noises = (part.repeat(len(process) - 1, 1, 1, 1) for part in (x_0, noise))
    config = DiffusionConfig(variance="learned_range", loss="hybrid", vlb_weight=1.0)
    optimizer = torch.optim.LBFGS([v], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = training_loss(process, config, model, images, steps, noises).mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    np.testing.assert_allclose(v.detach()[1:], best, atol=0.02)


def test_the_bins_of_the_decoder_sum_to_one() -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean in (-1.3, -1.0, -0.5, 0.0, 0.123, 0.99, 1.0, 1.5):
        for log_scale in (-6.0, -4.0, -2.0, 0.0, 1.0):
            at = torch.full_like(levels, mean)
            mass = discretized_gaussian_log_likelihood(levels, at, torch.full_like(levels, log_scale)).exp()
            assert mass.sum().item() == pytest.approx(1, abs=1e-9)


def test_the_decoder_is_the_mass_of_the_bin_and_stays_finite_far_away() -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, scale = torch.full_like(levels, 0.2), torch.full_like(levels, math.log(0.3))
    upper = np.where(levels > 0.999, np.inf, levels + 1 / 255)
    lower = np.where(levels < -0.999, -np.inf, levels - 1 / 255)
    expected = np.log(norm.cdf(upper, 0.2, 0.3) - norm.cdf(lower, 0.2, 0.3))
    ours = discretized_gaussian_log_likelihood(levels, mean, scale)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    x = torch.tensor([-0.5, 0.0, 0.5])
    far = torch.full_like(x, 0.9).requires_grad_()
    likelihood = discretized_gaussian_log_likelihood(x, far, torch.full_like(x, -5.0))
    likelihood.sum().backward()
    assert likelihood.isfinite().all()
    assert far.grad is not None
    assert far.grad.isfinite().all()
    assert (far.grad < 0).all()  # the gradient moves the mean towards the pixel, however far that is


def test_the_divergence_of_normals_is_that_of_torch() -> None:
    mean1, log1, mean2, log2 = torch.randn(
        4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    p, q = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((mean1, log1), (mean2, log2)))
    torch.testing.assert_close(normal_kl(mean1, log1, mean2, log2), torch.distributions.kl_divergence(p, q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_and_decoder_are_numbers_at_every_variance(dtype: torch.dtype) -> None:
    means = torch.tensor([0.0, 1e-30, 1e-3, 1.0, -1.0, 1e4], dtype=dtype)
    logs = torch.tensor([-1500.0, -250.0, -180.0, -90.0, -20.0, 0.0, 20.0, 90.0], dtype=dtype)
    grids = torch.meshgrid(means, means, logs, logs, indexing="ij")
    mean1, mean2, log1, log2 = (grid.flatten() for grid in grids)
    kl = normal_kl(mean1, log1, mean2, log2)
    assert not kl.isnan().any()
    assert (kl >= 0).all()
    assert (kl[(mean1 == mean2) & (log1 == log2)] == 0).all()
    level, mean, scale = (
        grid.flatten() for grid in torch.meshgrid(means[[0, 3, 4]], means, logs, indexing="ij")
    )
    for offset in (0.0, 1 / 255, -1 / 255):  # also on the edges of a bin
        likelihood = discretized_gaussian_log_likelihood(level, mean + offset, scale)
        assert not likelihood.isnan().any()
        assert (likelihood <= 0).all()


PMF = np.zeros(256)
PMF[[20, 21, 90, 100, 180, 181, 182, 240]] = [0.3, 0.05, 0.1, 0.2, 0.05, 0.15, 0.05, 0.1]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_the_bound_is_never_below_the_entropy_of_the_pixels(schedule: str, variance: Variance) -> None:
    data, process = pixels(PMF, nodes=40), process_of(100, variance, schedule)
    bits = {}
    for name, model in {"optimal": data.optimal(process), "worse": worse(data.optimal(process))}.items():
        terms, prior = vlb_terms(process, model, data.x_0, lambda t: data.noise)
        bits[name] = data.mean(terms.sum(1) + prior)
    assert data.entropy < bits["optimal"] < bits["worse"]
    if variance == "learned_range":
        assert bits["optimal"] < data.entropy + 1


def worse(model: Model) -> Model:
    """Return a model with the same variance and an epsilon that is a tenth too small."""

    def wrapped(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        output = model(x_t, t, labels)
        return torch.cat([0.9 * output[:, :1], output[:, 1:]], dim=1)

    return wrapped


def test_uniform_pixels_cost_at_least_eight_bits() -> None:
    data, process = pixels(np.full(256, 1 / 256), nodes=12), process_of(25)
    for model in (data.optimal(process), lambda x, t, labels: 0 * x):
        terms, prior = vlb_terms(process, model, data.x_0, lambda t: data.noise)
        assert data.mean(terms.sum(1) + prior) >= 8


def test_the_prior_term_of_linear_with_1000_steps_is_negligible() -> None:
    """It is 7e-6 to 1e-5 bits/dim for pixels uniform in [-1, 1], as for real images."""
    x_0 = (torch.arange(256) / 127.5 - 1).reshape(256, 1, 1, 1)
    prior = prior_bits_per_dim(process_of(timesteps=1000), x_0).mean().item()
    assert 7e-6 < prior < 1e-5


@pytest.mark.parametrize(("timesteps", "count"), [(11, 4), (11, 10), (40, 2), (40, 12)])
def test_the_stratified_estimate_is_unbiased_and_its_variance_is_what_it_says(
    timesteps: int, count: int
) -> None:
    data, process = gaussian(), process_of(timesteps)
    x_0 = joint(data, 0)[0][:1] * 0.1
    noise = torch.full_like(x_0, 0.7)
    terms, prior = vlb_terms(process, data.optimal_eps(process), x_0, lambda t: noise)
    exact = (terms.sum() + prior).item()
    u = torch.from_numpy(np.random.default_rng(0).uniform(size=(4000, count)))
    many = x_0.expand(len(u), -1, -1, -1)
    estimates, variances = stratified_vlb(
        process, data.optimal_eps(process), many, lambda t: noise.expand_as(many), u
    )
    spread = estimates.std().item()
    assert abs(estimates.mean().item() - exact) < 4 * spread / math.sqrt(len(u))
    assert variances.mean().item() == pytest.approx(spread**2, rel=0.15)


def test_the_estimate_is_precise_where_the_terms_are_large() -> None:
    """The estimate computes few of many terms, but always the first ones, which are most of the bound."""
    data, process = gaussian(), process_of(timesteps=1000, schedule="cosine")
    x_0 = joint(data, 0)[0][:1] * 0.1
    noise = torch.full_like(x_0, 0.7)
    terms, prior = vlb_terms(process, data.optimal_eps(process), x_0, lambda t: noise)
    u = torch.from_numpy(np.random.default_rng(0).uniform(size=(200, 20)))
    many = x_0.expand(len(u), -1, -1, -1)
    estimates, _ = stratified_vlb(
        process, data.optimal_eps(process), many, lambda t: noise.expand_as(many), u
    )
    exact = (terms.sum() + prior).item()
    spread = estimates.std().item()
    assert abs(estimates.mean().item() - exact) < 4 * spread / math.sqrt(len(u))
    assert spread < 0.1 * exact


def test_all_terms_as_an_estimate_are_the_exact_bound() -> None:
    data, process = gaussian(), process_of(timesteps=10)
    x_0, (noise,) = joint(data, 1)
    terms, prior = vlb_terms(process, data.optimal_eps(process), x_0, lambda t: noise)
    u = torch.from_numpy(np.random.default_rng(0).uniform(size=(len(x_0), 10)))
    estimate, variance = stratified_vlb(process, data.optimal_eps(process), x_0, lambda t: noise, u)
    torch.testing.assert_close(estimate, terms.sum(1) + prior)
    assert (variance == 0).all()
    for count in (3, 0, 12):
        with pytest.raises(InputError, match="even number"):
            stratified_vlb(
                process,
                data.optimal_eps(process),
                x_0,
                lambda t: noise,
                u[:1].expand(4, -1).new_ones(4, count),
            )


def one_pixel(values: Tensor) -> Tensor:
    """Return images of one pixel each, in [-1, 1], from values of 0 to 255."""
    return (values.double() / 127.5 - 1).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("occurring", [range(256), range(0, 256, 15), (3, 200)])
def test_the_softmax_decoder_is_a_distribution_over_all_values(occurring: range) -> None:
    process = process_of(timesteps=20)
    occurs = torch.zeros(256, dtype=torch.bool)
    occurs[list(occurring)] = True
    every = one_pixel(torch.arange(256))
    for x_1 in (-1.3, 0.02, 0.9):
        bits = softmax_decoder_bits(process, every, torch.full_like(every, x_1), occurs)
        assert (2**-bits).sum().item() == pytest.approx(1, abs=1e-9)
        # Bayes' rule with a uniform prior over the values that occur.
        level = math.sqrt(process.alpha_bar[0])
        density = norm.pdf(x_1, level * (np.arange(256) / 127.5 - 1), math.sqrt(1 - process.alpha_bar[0]))
        chance = (
            0.999 * density * occurs.numpy() / density[occurs.numpy()].sum() + 0.001 * density / density.sum()
        )
        np.testing.assert_allclose(bits, -np.log2(chance), rtol=1e-6, atol=1e-9)


def test_the_softmax_decoder_costs_nothing_without_noise_and_the_choice_of_a_value_with_nothing_but_noise() -> (
    None
):
    occurs = torch.zeros(256, dtype=torch.bool)
    occurs[::15] = True  # 18 values
    x_0 = one_pixel(torch.arange(0, 256, 15)).reshape(1, 1, 1, -1)
    noise = torch.randn(1, 1, 1, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.zeros(1, dtype=torch.int64)
    for first, expected in ((13.3, -math.log2(0.999)), (-13.3, math.log2(18) - math.log2(0.999))):
        betas = (1 / (1 + math.exp(first)),)
        process = make_process(DiffusionConfig(schedule="explicit", timesteps=1, betas=betas))
        x_1 = q_sample(process, x_0, t, noise)
        assert softmax_decoder_bits(process, x_0, x_1, occurs).item() == pytest.approx(expected, abs=0.02)
