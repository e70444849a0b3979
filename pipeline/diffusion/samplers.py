"""Samplers: ancestral sampling, DDIM and DPM-Solver++(2M), each with all or some of the steps.

Each `*_step` goes from x_t to x_{t-1} of a (respaced) process, given the model's output at x_t.
"""

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from pipeline.config import SamplerName
from pipeline.diffusion.losses import Model
from pipeline.diffusion.process import (
    Prediction,
    Process,
    p_mean_variance,
    respace,
    snr,
    spaced_timesteps,
    spread,
    take,
)
from pipeline.errors import InputError


def ancestral_step(prediction: Prediction, noise: Tensor | None) -> Tensor:
    """A draw of p(x_{t-1} | x_t) (Ho et al. 2020, algorithm 2). `noise` is None at t = 0."""
    if noise is None:
        return prediction.mean
    return prediction.mean + (prediction.log_variance / 2).exp() * noise


def ddim_step(
    process: Process, prediction: Prediction, t: Tensor, eta: float, noise: Tensor | None
) -> Tensor:
    """One step of DDIM (Song et al. 2021, equations 12 and 16).

    Args:
        eta: 0 = deterministic; 1 = the variance beta-tilde of the ancestral sampler.
        noise: standard normal, of x_t's shape; None = no noise, for eta = 0 or t = 0.
    """
    prev = take(process.alpha_bar_prev, t)
    variance = eta**2 * take(process.posterior_variance, t)
    direction = (1 - prev - variance).clamp(min=0).sqrt()
    x_0, eps = prediction.x_0, prediction.eps
    mean = spread(prev.sqrt(), x_0) * x_0 + spread(direction, x_0) * eps
    return mean if noise is None else mean + spread(variance.sqrt(), x_0) * noise


def dpm_solver_step(
    process: Process, x_0: Tensor, x_t: Tensor, t: Tensor, previous_x_0: Tensor | None
) -> Tensor:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2).

    Args:
        x_0: the model's prediction at x_t.
        previous_x_0: the model's prediction one step earlier, at t + 1. None makes the step first-order, as the first
            step must be. The step from t = 0 is first-order in any case and returns x_0.
    """
    prev = take(process.alpha_bar_prev, t)
    log_snr = snr(process).log() / 2
    now = take(log_snr, t)
    h = (prev / (1 - prev)).log() / 2 - now
    decay = spread(((1 - prev) / (1 - take(process.alpha_bar, t))).sqrt(), x_t)
    gain = spread(-prev.sqrt() * torch.expm1(-h), x_t)
    if previous_x_0 is None:
        return decay * x_t + gain * x_0
    before = take(log_snr, (t + 1).clamp(max=len(process) - 1))
    extrapolation = torch.where(t == 0, 0.0, h / (2 * (now - before)))
    return decay * x_t + gain * (x_0 + spread(extrapolation, x_t) * (x_0 - previous_x_0))


@torch.no_grad()
def sample(
    process: Process,
    model: Model,
    x_T: Tensor,
    noise: Callable[[int], Tensor],
    sampler: SamplerName,
    steps: int,
    eta: float = 0.0,
    labels: Tensor | None = None,
    guidance: float = 1.0,
    null_label: int | None = None,
    clip: bool = True,
    least_alpha_bar: float = 0.0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Samples images from the noise x_T, with one model call a step.

    Args:
        x_T: standard normal, [N, C, ...].
        noise: returns the standard normal noise of a step, of x_T's shape; called only for steps that add noise.
            Steps count from 0, the step that begins at x_T.
        sampler: "ancestral", "ddim" or "dpm_solver".
        steps: number of the process's T steps to take.
        eta: noise of DDIM, 0 to 1; the other samplers ignore it.
        labels: int64 [N] for a class-conditional model.
        guidance: w in eps_uncond + w (eps_cond - eps_uncond) (Ho & Salimans 2022); 1 = no guidance. Both are computed
            as one batch of twice the size. A learned variance is taken from the conditional half.
        null_label: the label that stands for "no label"; needed for guidance.
        clip: limit the predicted x_0 to [-1, 1] at each step.
        least_alpha_bar: start at the noisiest step whose alpha_bar is at least this; 0 = start at T. At smaller
            alpha_bar, x_t is almost pure noise, and a small error of epsilon becomes a large error of x_0. A cosine
            schedule starts at an alpha_bar of 2e-9 (Lu et al. 2022, appendix D.1).
        on_step: called with (step, x) after each step.

    Returns:
        x_0, of x_T's shape and dtype.

    Raises:
        InputError: `steps` is outside 1 to T (or 1 to the step where sampling starts), `eta` is outside 0 to 1, the
            sampler is unknown, no step has the required alpha_bar, or guidance is used without labels.
    """
    if sampler not in (names := get_args(SamplerName)):
        raise InputError(f"sampler: {sampler!r} is not one of {', '.join(names)}")
    if not 0 <= eta <= 1:
        raise InputError(f"eta: {eta} is outside 0 to 1")
    if guidance != 1 and (labels is None or null_label is None):
        raise InputError("guidance: needs labels and a class-conditional model; leave it at 1")
    usable = int((process.alpha_bar >= least_alpha_bar).sum())
    if not usable:
        raise InputError(f"least alpha_bar: {least_alpha_bar:g} is larger than that of every step")
    process = respace(process, spaced_timesteps(usable, steps)).to(x_T.device)
    x, previous_x_0 = x_T, None
    for step, index in enumerate(reversed(range(steps))):
        t = torch.full((x.shape[0],), index, device=x.device)
        output = _guided(model, x, take(process.timesteps, t), labels, guidance, null_label)
        prediction = p_mean_variance(process, output, x, t, clip)
        if sampler == "ancestral":
            x = ancestral_step(prediction, noise(step) if index > 0 else None)
        elif sampler == "ddim":
            x = ddim_step(process, prediction, t, eta, noise(step) if index > 0 and eta > 0 else None)
        else:
            x = dpm_solver_step(process, prediction.x_0, x, t, previous_x_0)
            previous_x_0 = prediction.x_0
        if on_step is not None:
            on_step(step, x)
    return x


def _guided(
    model: Model, x: Tensor, t: Tensor, labels: Tensor | None, guidance: float, null_label: int | None
) -> Tensor:
    if guidance == 1 or labels is None or null_label is None:
        return model(x, t, labels)
    both = torch.cat([labels, torch.full_like(labels, null_label)])
    conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    channels = x.shape[1]
    eps = unconditional[:, :channels] + guidance * (conditional[:, :channels] - unconditional[:, :channels])
    return torch.cat([eps, conditional[:, channels:]], dim=1)
