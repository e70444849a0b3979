"""Moments of samples from the optimal model for Gaussian data, exact by sigma points, against closed forms."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import SamplerName, Variance
from pipeline.diffusion.losses import Model
from pipeline.diffusion.process import Process, respace, spaced_timesteps
from pipeline.diffusion.samplers import sample
from pipeline.errors import InputError
from pipeline.evaluation.frechet import Moments, frechet_distance
from tests.diffusion.common import Chain, GaussianData, gaussian, image, moments, process_of, sigma_points

T = 24


def draw(
    process: Process,
    data: GaussianData,
    sampler: SamplerName,
    steps: int,
    *,
    eta: float = 0.0,
    model: Model | None = None,
    exact_start: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean [D] and covariance [D, D] of samples along the data's axes, from x_T ~ N(0, I) or from q(x_T)."""
    z = sigma_points(data.dims * steps).split(data.dims, dim=1)
    x_T = data.x_t(z[0], process.alpha_bar[-1].item()) if exact_start else image(z[0] @ data.axes.T)
    # A rotation to the data's axes leaves standard normal noise standard normal.
    x_0 = sample(
        process,
        model or data.optimal_eps(process),
        x_T,
        lambda step: image(z[step + 1] @ data.axes.T),
        sampler,
        steps,
        eta=eta,
        clip=False,
    )
    return moments(data, x_0)


def chain_of(process: Process, steps: int) -> Chain:
    """Return the respaced chain in numpy: betas from the ratio of neighbouring alpha_bars."""
    kept = Chain(process.beta.numpy()).alpha_bar[spaced_timesteps(len(process), steps)]
    return Chain(1 - kept / np.concatenate([[1.0], kept[:-1]]))


def recursion(
    chain: Chain,
    data: GaussianData,
    step: Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance [D] of x_0 per axis, for x_T ~ N(0, I).

    A step is x_{t-1} - sqrt(abar_{t-1}) mean = a (x_t - sqrt(abar_t) mean) + noise of variance s2. `step` gives a
    and s2 from t and from the gain by which E[x_0 | x_t] depends on x_t.
    """
    mean = data.along_axes(data.mean[None])[0].numpy()
    offset, variance = -np.sqrt(chain.alpha_bar[-1]) * mean, np.ones(data.dims)
    for t in reversed(range(len(chain.beta))):
        abar, eigen = chain.alpha_bar[t], data.variances.numpy()
        a, s2 = step(t, np.sqrt(abar) * eigen / (abar * eigen + 1 - abar))
        offset, variance = a * offset, a**2 * variance + s2
    return mean + offset, variance


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [T, 9, 2, 1])
def test_ancestral_samples_of_any_number_of_steps_have_the_closed_forms_moments(
    variance: Variance, steps: int
) -> None:
    data, process = gaussian(2), process_of(T, variance)
    chain = chain_of(process, steps)
    sigma2 = chain.beta if variance == "fixed_large" else chain.beta_tilde

    def step(t: int, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        of_x_0 = np.sqrt(chain.alpha_bar_prev[t]) * chain.beta[t] / (1 - chain.alpha_bar[t])
        of_x_t = np.sqrt(1 - chain.beta[t]) * (1 - chain.alpha_bar_prev[t]) / (1 - chain.alpha_bar[t])
        return of_x_0 * gain + of_x_t, np.full(2, sigma2[t] if t else 0.0)

    expected_mean, expected_variance = recursion(chain, data, step)
    mean, covariance = draw(process, data, "ancestral", steps)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(covariance, np.diag(expected_variance), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [T, 9, 1])
def test_ddim_samples_have_the_closed_forms_moments(eta: float, steps: int) -> None:
    data, process = gaussian(2), process_of(T)
    chain = chain_of(process, steps)

    def step(t: int, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        abar, prev = chain.alpha_bar[t], chain.alpha_bar_prev[t]
        s2 = eta**2 * (1 - prev) / (1 - abar) * (1 - abar / prev)  # DDIM (Song et al.), equation 16
        eps = (1 - np.sqrt(abar) * gain) / np.sqrt(1 - abar)
        return np.sqrt(prev) * gain + np.sqrt(1 - prev - s2) * eps, np.full(2, s2)

    expected_mean, expected_variance = recursion(chain, data, step)
    mean, covariance = draw(process, data, "ddim", steps, eta=eta)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(covariance, np.diag(expected_variance), rtol=1e-8, atol=1e-9)


def test_ddim_with_eta_1_is_ancestral_sampling_with_beta_tilde() -> None:
    data, process = gaussian(2), process_of(T, "fixed_small")
    for steps in (T, 7):
        ddim, ancestral = draw(process, data, "ddim", steps, eta=1.0), draw(process, data, "ancestral", steps)
        np.testing.assert_allclose(ddim[0], ancestral[0], rtol=1e-9)
        np.testing.assert_allclose(ddim[1], ancestral[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [T, 9, 3, 1])
def test_with_the_true_variance_learned_respaced_samples_are_exact(steps: int) -> None:
    """For Gaussian data q(x_{t-1} | x_t) is normal, so a chain of any length ends with Var[E[x_0 | x_1]]."""
    data = GaussianData(gaussian(2).mean, gaussian(2).variances, torch.eye(2, dtype=torch.float64))
    process = process_of(T, "learned_range")
    short, chain = respace(process, spaced_timesteps(T, steps)), chain_of(process, steps)
    posterior = data.posterior_variance(chain.alpha_bar)
    coefficient = np.sqrt(chain.alpha_bar_prev) * chain.beta / (1 - chain.alpha_bar)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.log(chain.beta_tilde)[:, None], np.log(chain.beta)[:, None]
        true = np.log(chain.beta_tilde[:, None] + coefficient[:, None] ** 2 * posterior)
        v = torch.from_numpy(np.nan_to_num(2 * (true - low) / (high - low) - 1))
    optimal, index = data.optimal_eps(process), {t: i for i, t in enumerate(short.timesteps.tolist())}

    def model(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        rows = v[[index[step] for step in t.tolist()]]
        return torch.cat([optimal(x_t, t, labels), image(rows)], dim=1)

    mean, covariance = draw(process, data, "ancestral", steps, model=model, exact_start=True)
    np.testing.assert_allclose(mean, data.mean, rtol=1e-8)
    np.testing.assert_allclose(covariance, np.diag(data.variances.numpy() - posterior[0]), atol=1e-8)


def flow_error(sampler: SamplerName, steps: int) -> float:
    """Return the largest error of the samples' std against the probability-flow ODE, which scales x_t by its std."""
    data, process = gaussian(2), process_of(1000, schedule="cosine")
    end, eigen = Chain(process.beta.numpy()).alpha_bar[-1], data.variances.numpy()
    exact = np.sqrt(eigen / (end * eigen + 1 - end))
    _, covariance = draw(process, data, sampler, steps)
    return float(np.abs(np.sqrt(np.diag(covariance)) - exact).max())


def test_dpm_solver_converges_to_the_flow_with_order_two_and_ddim_with_order_one() -> None:
    ddim = flow_error("ddim", 20) / flow_error("ddim", 40)
    dpm = flow_error("dpm_solver", 20) / flow_error("dpm_solver", 40)
    assert 1.7 < ddim < 2.6
    assert dpm > 3
    assert flow_error("dpm_solver", 20) < 0.2 * flow_error("ddim", 20)


def test_frechet_distance_of_samples_is_the_closed_form() -> None:
    """Both Gaussians have the same axes, so it is ||difference of means||^2 + sum (sqrt l - sqrt c)^2."""
    data, process = gaussian(2), process_of(T)
    mean, covariance = draw(process, data, "ddim", 6)
    real_mean = data.along_axes(data.mean[None])[0].numpy()
    distance = frechet_distance(
        Moments(101, real_mean, np.diag(data.variances.numpy()) * 100), Moments(101, mean, covariance * 100)
    )
    roots = np.sqrt(data.variances.numpy()) - np.sqrt(np.diag(covariance))
    assert distance == pytest.approx(((mean - real_mean) ** 2).sum() + (roots**2).sum(), rel=1e-8)
    assert distance > 1e-3


def labelled(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    return x_t * labels.reshape(-1, 1, 1, 1) / 10


def sampled(model: Model, **options: object) -> Tensor:
    x_T = image(sigma_points(2))
    labels = torch.tensor([1, 2, 3, 4])
    return sample(process_of(T), model, x_T, lambda s: x_T, "ddim", 5, labels=labels, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm_solver"])
def test_the_first_step_is_the_last_one_of_enough_alpha_bar(sampler: SamplerName) -> None:
    process, seen = process_of(1000, schedule="cosine"), list[int]()

    def model(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(int(t[0]))
        return x_t

    x_T = image(sigma_points(2))
    for least in (0.0, 1e-3, 0.02, 0.5):
        seen.clear()
        sample(process, model, x_T, lambda step: x_T, sampler, 10, least_alpha_bar=least)
        assert (len(seen), seen) == (10, sorted(seen, reverse=True))
        assert process.alpha_bar[seen[0]] >= least
        assert seen[0] == 999 or process.alpha_bar[seen[0] + 1] < least
    with pytest.raises(InputError, match="larger than that of every step"):
        sample(process, model, x_T, lambda step: x_T, sampler, 10, least_alpha_bar=1.0)


def test_a_small_error_of_epsilon_does_less_where_the_first_step_has_enough_alpha_bar() -> None:
    """The optimal model for N(0.1, 0.3^2) is compared with itself plus an error of 0.03. x_0 is clipped."""
    process = process_of(1000, schedule="cosine")

    def model(error: float) -> Model:
        def eps(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            bar = process.alpha_bar[t][:, None, None, None]
            return (1 - bar).sqrt() / (bar * 0.09 + 1 - bar) * (x_t - bar.sqrt() * 0.1) + error

        return eps

    x_T = torch.randn(256, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def shift(least: float) -> float:
        exact, off = (
            sample(process, model(error), x_T, lambda step: x_T, "ddim", 25, least_alpha_bar=least)
            for error in (0.0, 0.03)
        )
        return (exact - off).mean().abs().item()

    assert shift(5e-3) < 0.75 * shift(0.0)


def test_guidance_extrapolates_from_the_model_without_label_to_that_with_it() -> None:
    """eps = eps_uncond + w (eps_cond - eps_uncond), with each sample's own label."""

    def mixed(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return 3 * labelled(x_t, t, labels) - 2 * labelled(x_t, t, torch.full((len(x_t),), 9))

    torch.testing.assert_close(sampled(labelled, guidance=3.0, null_label=9), sampled(mixed))
    torch.testing.assert_close(sampled(labelled, guidance=1.0, null_label=9), sampled(labelled))
    without = sampled(lambda x, t, labels: labelled(x, t, torch.full((len(x),), 9)))
    torch.testing.assert_close(sampled(labelled, guidance=0.0, null_label=9), without)


def test_a_learned_variance_is_that_of_the_label_when_guided() -> None:
    process = process_of(T, "learned_range")
    x_T, labels = image(sigma_points(2)), torch.tensor([1, 2, 3, 4])

    def model(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return torch.cat([0 * x_t, torch.ones_like(x_t) * (labels == 9).reshape(-1, 1, 1, 1)], dim=1)

    guided, plain = (
        sample(process, model, x_T, lambda s: x_T, "ancestral", T, labels=labels, guidance=w, null_label=9)
        for w in (2.0, 1.0)
    )
    torch.testing.assert_close(guided, plain)


def test_samples_do_not_depend_on_their_batch() -> None:
    data, process = gaussian(2), process_of(T)
    x_T = image(sigma_points(6)[:, :2])
    for sampler in ("ancestral", "ddim", "dpm_solver"):

        def run(rows: slice, sampler: SamplerName = sampler) -> Tensor:  # type: ignore[assignment]
            return sample(
                process,
                data.optimal_eps(process),
                x_T[rows],
                lambda s: x_T[rows] / (s + 1),
                sampler,
                6,
                eta=0.5,
            )

        torch.testing.assert_close(torch.cat([run(slice(0, 5)), run(slice(5, 12))]), run(slice(0, 12)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"steps": 0}, "outside 1 to"),
        ({"steps": T + 1}, "outside 1 to"),
        ({"eta": 1.5}, "eta"),
        ({"sampler": "euler"}, "not one of"),
        ({"guidance": 2.0}, "needs labels"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, object], reason: str) -> None:
    x_T = image(sigma_points(2))
    settings = {"sampler": "ddim", "steps": 3} | options
    with pytest.raises(InputError, match=reason):
        sample(process_of(T), lambda x, t, labels: x, x_T, lambda s: x_T, **settings)  # type: ignore[arg-type]
