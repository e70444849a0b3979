"""The forward process q, its posterior, and the reverse process p (Ho et al. 2020, sections 2 and 3).

Time is 0-based in the whole code: index t = 0 is the first, least noisy step, which the papers call t = 1,
and t = T - 1 is their T. So alpha_bar[t] is the papers' alpha-bar_{t+1}, and alpha_bar_prev[0] = 1.

Coefficients are computed in float64 and cast to the images' dtype only to multiply with them. Everywhere,
images have shape [N, C, ...] and `t` is int64 of shape [N], one step for every image, on the same device.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config import DiffusionConfig, Variance
from pipeline.diffusion.schedules import make_betas
from pipeline.errors import InputError


@dataclass(frozen=True)
class Process:
    """The coefficients of a chain of T steps: float64 tensors of shape [T], but for the last two fields."""

    beta: Tensor
    alpha: Tensor
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    posterior_variance: Tensor
    """beta-tilde (equation 7); zero at t = 0, where q(x_{t-1} | x_t, x_0) is the point x_0."""
    posterior_log_variance_clipped: Tensor
    """log beta-tilde, with the value of t = 1 at t = 0 too (log beta where the chain has one step)."""
    posterior_mean_coef1: Tensor
    """Factor of x_0 in the posterior mean (equation 7)."""
    posterior_mean_coef2: Tensor
    """Factor of x_t in the posterior mean (equation 7)."""
    timesteps: Tensor
    """int64 [T]: the step of the original chain that the model is told at each index."""
    variance: Variance

    def __len__(self) -> int:
        return len(self.beta)

    def to(self, device: torch.device | str) -> "Process":
        """The same process with its tables on `device`, which saves a copy at every use."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "variance"}
        return dataclasses.replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


class Gaussian(NamedTuple):
    """A diagonal Gaussian; each field has the images' shape."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t) = N(mean, variance), and the x_0 and epsilon it was made from; all of x_t's shape."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_0: Tensor
    eps: Tensor


def make_process(config: DiffusionConfig) -> Process:
    """The process that `config` describes, with its tables on the CPU.

    Raises:
        InputError: see `schedules.make_betas`.
    """
    betas = make_betas(config)
    return _from_alpha_bar(torch.cumprod(1 - betas, 0), betas, torch.arange(len(betas)), config.variance)


def respace(process: Process, steps: Sequence[int]) -> Process:
    """The chain that visits only `steps`: q(x_t | x_0) stays (Nichol & Dhariwal 2021, equation 19).

    Args:
        steps: indices into `process`, strictly increasing.

    Raises:
        InputError: `steps` is empty, not increasing, or outside the chain.
    """
    if not steps or any(a >= b for a, b in pairwise(steps)):
        raise InputError("sampling steps: expected at least one, in increasing order")
    if steps[0] < 0 or steps[-1] >= len(process):
        raise InputError(f"sampling steps: {steps[0]} to {steps[-1]} isn't within 0 to {len(process) - 1}")
    if len(steps) == len(process):
        return process
    kept = torch.tensor(steps, device=process.beta.device)
    alpha_bar = process.alpha_bar[kept]
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return _from_alpha_bar(alpha_bar, betas, process.timesteps[kept], process.variance)


def spaced_timesteps(timesteps: int, count: int) -> list[int]:
    """`count` steps evenly over a chain of `timesteps`, always with its last one, where sampling starts.

    Raises:
        InputError: `count` is outside 1 to `timesteps`.
    """
    if not 1 <= count <= timesteps:
        raise InputError(f"sampling steps: {count} is outside 1 to {timesteps}, the model's timesteps")
    return [(i + 1) * timesteps // count - 1 for i in range(count)]


def _from_alpha_bar(alpha_bar: Tensor, beta: Tensor, timesteps: Tensor, variance: Variance) -> Process:
    alpha = 1 - beta
    alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    posterior_variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    first = posterior_variance[1:2] if len(beta) > 1 else beta
    return Process(
        beta=beta,
        alpha=alpha,
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        posterior_variance=posterior_variance,
        posterior_log_variance_clipped=torch.cat([first, posterior_variance[1:]]).log(),
        posterior_mean_coef1=beta * alpha_bar_prev.sqrt() / (1 - alpha_bar),
        posterior_mean_coef2=(1 - alpha_bar_prev) * alpha.sqrt() / (1 - alpha_bar),
        timesteps=timesteps,
        variance=variance,
    )


def take(table: Tensor, t: Tensor) -> Tensor:
    """table[t] on the device of `t`, in the table's own dtype: shape [N]."""
    return table.to(t.device)[t]


def spread(values: Tensor, like: Tensor) -> Tensor:
    """`values` [N] in the dtype and the number of dimensions of `like` [N, ...], to be broadcast with it."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def q_sample(process: Process, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise, a draw of q(x_t | x_0) (equation 4)."""
    alpha_bar = take(process.alpha_bar, t)
    return spread(alpha_bar.sqrt(), x_0) * x_0 + spread((1 - alpha_bar).sqrt(), x_0) * noise


def q_step(process: Process, x_prev: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, one step of the chain (equation 2)."""
    beta = take(process.beta, t)
    return spread((1 - beta).sqrt(), x_prev) * x_prev + spread(beta.sqrt(), x_prev) * noise


def q_mean_variance(process: Process, x_0: Tensor, t: Tensor) -> Gaussian:
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) (equation 4)."""
    alpha_bar = take(process.alpha_bar, t)
    variance = 1 - alpha_bar
    return Gaussian(
        spread(alpha_bar.sqrt(), x_0) * x_0,
        spread(variance, x_0).expand_as(x_0),
        spread(variance.log(), x_0).expand_as(x_0),
    )


def q_posterior(process: Process, x_0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
    """q(x_{t-1} | x_t, x_0) (equations 6 and 7); the log variance is the clipped one (see `Process`)."""
    coef1, coef2 = take(process.posterior_mean_coef1, t), take(process.posterior_mean_coef2, t)
    return Gaussian(
        spread(coef1, x_t) * x_0 + spread(coef2, x_t) * x_t,
        spread(take(process.posterior_variance, t), x_t).expand_as(x_t),
        spread(take(process.posterior_log_variance_clipped, t), x_t).expand_as(x_t),
    )


def predict_x_0(process: Process, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t): `q_sample` solved for x_0."""
    alpha_bar = take(process.alpha_bar, t)
    return (x_t - spread((1 - alpha_bar).sqrt(), x_t) * eps) / spread(alpha_bar.sqrt(), x_t)


def predict_eps(process: Process, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    """eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t): `q_sample` solved for the noise."""
    alpha_bar = take(process.alpha_bar, t)
    return (x_t - spread(alpha_bar.sqrt(), x_t) * x_0) / spread((1 - alpha_bar).sqrt(), x_t)


def posterior_mean_from_eps(process: Process, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """mu = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t) (equation 11)."""
    beta, alpha_bar = take(process.beta, t), take(process.alpha_bar, t)
    return (x_t - spread(beta / (1 - alpha_bar).sqrt(), x_t) * eps) / spread((1 - beta).sqrt(), x_t)


def snr(process: Process) -> Tensor:
    """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of every step: float64, shape [T]."""
    return process.alpha_bar / (1 - process.alpha_bar)


def model_log_variance(process: Process) -> Tensor:
    """log sigma_t^2 of p(x_{t-1} | x_t) where it is fixed: float64, shape [T].

    sigma_t^2 is beta_t (fixed-large) or beta-tilde_t (fixed-small) (section 3.2). At t = 0 both take
    beta-tilde of t = 1: no noise is added there, and the width serves the decoder of L_0 alone, for which
    beta-tilde is zero and beta_0 is wider than need be.

    Raises:
        InputError: the variance is learned.
    """
    if process.variance == "learned_range":
        raise InputError("variance: learned_range has no fixed table; use fixed_large or fixed_small")
    if process.variance == "fixed_small":
        return process.posterior_log_variance_clipped
    return torch.cat([process.posterior_log_variance_clipped[:1], process.beta[1:].log()])


def p_mean_variance(process: Process, model_output: Tensor, x_t: Tensor, t: Tensor, clip: bool) -> Prediction:
    """p(x_{t-1} | x_t) from what the model says (equation 11; Nichol & Dhariwal 2021, equation 15).

    Args:
        model_output: epsilon [N, C, ...]; with a learned variance [N, 2C, ...], epsilon and then v, of which
            (v + 1) / 2 interpolates from log beta-tilde (clipped) to log beta.
        clip: limit x_0 to [-1, 1], and let mean and epsilon follow from it.

    Raises:
        InputError: the model's channels don't fit the process's variance.
    """
    learned = process.variance == "learned_range"
    channels = x_t.shape[1] * (2 if learned else 1)
    if model_output.shape != (x_t.shape[0], channels, *x_t.shape[2:]):
        raise InputError(
            f"model: gave shape {tuple(model_output.shape)} for images {tuple(x_t.shape)}; "
            f"the variance {process.variance} needs {channels} channels"
        )
    model_output = model_output.to(x_t.dtype)
    if learned:
        eps, v = model_output.chunk(2, dim=1)
        smallest = spread(take(process.posterior_log_variance_clipped, t), x_t)
        largest = spread(take(process.beta, t).log(), x_t)
        log_variance = smallest + (v + 1) / 2 * (largest - smallest)
    else:
        eps = model_output
        log_variance = spread(take(model_log_variance(process), t), x_t).expand_as(x_t)
    x_0 = predict_x_0(process, x_t, t, eps)
    if clip:
        x_0 = x_0.clamp(-1, 1)
        eps = predict_eps(process, x_t, t, x_0)
    return Prediction(q_posterior(process, x_0, x_t, t).mean, log_variance.exp(), log_variance, x_0, eps)
