"""The forward process q, its posterior, and the reverse process p (Ho et al. 2020, sections 2 and 3).

Time is 0-based throughout the code: index t = 0 is the first, least noisy step (t = 1 in the papers), and t = T - 1
is the papers' T. So alpha_bar[t] is the papers' alpha-bar_{t+1}, and alpha_bar_prev[0] = 1.

Coefficients are computed in float64 and cast to the images' dtype only for the multiplication. Images have shape
[N, C, ...], and `t` is int64 [N], one step for each image, on the same device. Equation numbers are those of Ho et
al. 2020 unless another paper is named.
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
    """The coefficients of a chain of T steps: float64 tensors of shape [T], except for the last two fields."""

    beta: Tensor
    alpha: Tensor
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    posterior_variance: Tensor
    """beta-tilde (equation 7). It is zero at t = 0, where q(x_{t-1} | x_t, x_0) is the point x_0."""
    posterior_log_variance_clipped: Tensor
    """log beta-tilde, where t = 0 has the value of t = 1 (log beta if the chain has one step)."""
    posterior_mean_coef1: Tensor
    """Factor of x_0 in the posterior mean (equation 7)."""
    posterior_mean_coef2: Tensor
    """Factor of x_t in the posterior mean (equation 7)."""
    timesteps: Tensor
    """int64 [T]: for each index, the step of the original chain that is passed to the model."""
    variance: Variance

    def __len__(self) -> int:
        return len(self.beta)

    def to(self, device: torch.device | str) -> "Process":
        """The same process with its tensors on `device`, which avoids a copy at each use."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "variance"}
        return dataclasses.replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


class Gaussian(NamedTuple):
    """A diagonal Gaussian; each field has the images' shape."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t) = N(mean, variance), and the x_0 and epsilon that it was computed from; all of x_t's shape."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_0: Tensor
    eps: Tensor


def make_process(config: DiffusionConfig) -> Process:
    """The process that `config` describes, with its tensors on the CPU.

    Raises:
        InputError: as `schedules.make_betas`.
    """
    betas = make_betas(config)
    return _from_alpha_bar(torch.cumprod(1 - betas, 0), betas, torch.arange(len(betas)), config.variance)


def respace(process: Process, steps: Sequence[int]) -> Process:
    """The chain that visits only `steps`, with the same q(x_t | x_0) (Nichol & Dhariwal 2021, equation 19).

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
    """`count` evenly spaced steps of a chain of `timesteps`. They always include the last, where sampling starts.

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
    """table[t] on the device of `t`, in the table's own dtype: [N]."""
    return table.to(t.device)[t]


def spread(values: Tensor, like: Tensor) -> Tensor:
    """`values` [N] in the dtype of `like` [N, ...], reshaped so that they broadcast with it."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def q_sample(process: Process, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """A draw of q(x_t | x_0): x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (equation 4)."""
    alpha_bar = take(process.alpha_bar, t)
    return spread(alpha_bar.sqrt(), x_0) * x_0 + spread((1 - alpha_bar).sqrt(), x_0) * noise


def q_step(process: Process, x_prev: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """One step of the chain: x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise (equation 2)."""
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
    """q(x_{t-1} | x_t, x_0) (equations 6 and 7). Its log variance is the clipped one (see `Process`)."""
    coef1, coef2 = take(process.posterior_mean_coef1, t), take(process.posterior_mean_coef2, t)
    return Gaussian(
        spread(coef1, x_t) * x_0 + spread(coef2, x_t) * x_t,
        spread(take(process.posterior_variance, t), x_t).expand_as(x_t),
        spread(take(process.posterior_log_variance_clipped, t), x_t).expand_as(x_t),
    )


def predict_x_0(process: Process, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """`q_sample` solved for x_0: (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)."""
    alpha_bar = take(process.alpha_bar, t)
    return (x_t - spread((1 - alpha_bar).sqrt(), x_t) * eps) / spread(alpha_bar.sqrt(), x_t)


def predict_eps(process: Process, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    """`q_sample` solved for the noise: (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)."""
    alpha_bar = take(process.alpha_bar, t)
    return (x_t - spread(alpha_bar.sqrt(), x_t) * x_0) / spread((1 - alpha_bar).sqrt(), x_t)


def posterior_mean_from_eps(process: Process, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The posterior mean mu = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t) (equation 11)."""
    beta, alpha_bar = take(process.beta, t), take(process.alpha_bar, t)
    return (x_t - spread(beta / (1 - alpha_bar).sqrt(), x_t) * eps) / spread((1 - beta).sqrt(), x_t)


def snr(process: Process) -> Tensor:
    """The signal-to-noise ratio alpha_bar / (1 - alpha_bar) of each step: float64 [T]."""
    return process.alpha_bar / (1 - process.alpha_bar)


def model_log_variance(process: Process) -> Tensor:
    """log sigma_t^2 of p(x_{t-1} | x_t) for a fixed variance: float64 [T].

    sigma_t^2 is beta_t (fixed_large) or beta-tilde_t (fixed_small) (section 3.2). At t = 0 both use beta-tilde of t =
    1. No noise is added there, and only the decoder of L_0 uses the width: beta-tilde is zero there, and beta_0 would
    be wider than necessary.

    Raises:
        InputError: the variance is learned.
    """
    if process.variance == "learned_range":
        raise InputError("variance: learned_range has no fixed table; use fixed_large or fixed_small")
    if process.variance == "fixed_small":
        return process.posterior_log_variance_clipped
    return torch.cat([process.posterior_log_variance_clipped[:1], process.beta[1:].log()])


def p_mean_variance(process: Process, model_output: Tensor, x_t: Tensor, t: Tensor, clip: bool) -> Prediction:
    """p(x_{t-1} | x_t) from the model's output (equation 11; Nichol & Dhariwal 2021, equation 15).

    Args:
        model_output: epsilon [N, C, ...]. With a learned variance [N, 2C, ...]: epsilon, then v, where (v + 1) / 2
            interpolates from log beta-tilde (clipped) to log beta.
        clip: limit x_0 to [-1, 1], and recompute mean and epsilon from it.

    Raises:
        InputError: the number of the model's channels does not fit the variance.
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
