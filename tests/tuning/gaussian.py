"""Gaussian pixels, for which the optimal model and so the bound of every schedule and T are known.

`known_bound` follows the papers' formulas in numpy and shares no code with the pipeline. `GaussianTrial` measures the
same bound as a trial does, from samples, with the pipeline's own losses.

Trials stand here, because each worker imports the module of its trial, and this one imports little.
"""

import math
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_ndtr
from torch import Tensor

from pipeline.config import DiffusionConfig
from pipeline.diffusion.losses import vlb_terms
from pipeline.diffusion.process import make_process, take
from pipeline.evaluation.config import BITS_PER_DIM
from pipeline.rng import Purpose, normal
from pipeline.tuning.ledger import Rung
from pipeline.tuning.trial import Trial, training

MEAN, STD = 0.1, 0.2
IMAGES, PIXELS = 64, (1, 8, 8)


def pixel_values() -> tuple[np.ndarray, np.ndarray]:
    """Return the 256 pixel values in [-1, 1] and their probabilities, those of a rounded normal."""
    x = np.arange(256) / 127.5 - 1
    p = np.exp(-0.5 * ((x - MEAN) / STD) ** 2)
    return x, p / p.sum()


def betas(schedule: str, timesteps: int) -> np.ndarray:
    """Return the published betas (linear: Ho et al.; cosine: Nichol & Dhariwal), rescaled to T, [T]."""
    if schedule == "linear":
        return np.minimum(np.linspace(0.1, 20, timesteps) / timesteps, 0.999)
    if schedule == "quadratic":
        return np.minimum(np.linspace(math.sqrt(0.1), math.sqrt(20), timesteps) ** 2 / timesteps, 0.999)
    if schedule == "sigmoid":
        level = 1 / (1 + np.exp(-np.linspace(-3, 3, timesteps + 1)))
        bar = (level[-1] - level) / (level[-1] - level[0])
    else:
        bar = np.cos((np.linspace(0, 1, timesteps + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


def known_bound(schedule: str, timesteps: int, variance: str) -> float:
    """Return L_T + sum of L_{t-1} + L_0 of the best linear model, bits/dim, with a quadrature for the decoder."""
    x, p = pixel_values()
    spread = float(p @ (x - MEAN) ** 2)
    beta = betas(schedule, timesteps)
    bar = np.cumprod(1 - beta)
    before = np.concatenate([[1.0], bar[:-1]])
    # The guess of x_0 is linear in x_t. `error` is its mean squared error.
    gain = np.sqrt(bar) * STD**2 / (bar * STD**2 + 1 - bar)
    error = (1 - gain * np.sqrt(bar)) ** 2 * spread + gain**2 * (1 - bar)
    tilde = (1 - before) / (1 - bar) * beta
    tilde[0] = tilde[1]
    sigma2 = tilde.copy() if variance == "fixed_small" else np.concatenate([[tilde[1]], beta[1:]])
    weight = np.sqrt(before) * beta / (1 - bar)
    ratio = tilde / sigma2
    terms = 0.5 * (ratio - 1 - np.log(ratio) + weight**2 * error / sigma2)
    second = float(p @ x**2)
    prior = 0.5 * (bar[-1] * second - bar[-1] - np.log(1 - bar[-1]))
    return float((terms[1:].sum() + prior + _decoder(x, p, bar[0], gain[0], sigma2[0])) / math.log(2))


def _decoder(x: np.ndarray, p: np.ndarray, bar: float, gain: float, sigma2: float) -> float:
    """Return E[-log of the mass that N(guess, sigma^2) gives the bin of x_0], over x_0 and the noise of x_1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    weights = weights / weights.sum()
    x_1 = math.sqrt(bar) * x[:, None] + math.sqrt(1 - bar) * nodes
    guess = MEAN + gain * (x_1 - math.sqrt(bar) * MEAN)
    sigma, half = math.sqrt(sigma2), 1 / 255
    upper, lower = (x[:, None] + half - guess) / sigma, (x[:, None] - half - guess) / sigma
    flipped = lower + upper > 0
    high, low = np.where(flipped, -lower, upper), np.where(flipped, -upper, lower)
    inside = log_ndtr(high) + np.log(-np.expm1(np.minimum(log_ndtr(low) - log_ndtr(high), -1e-300)))
    inside[0], inside[-1] = log_ndtr(upper[0]), log_ndtr(-lower[-1])
    return float(-(p @ inside @ weights))


def measured_bound(diffusion: DiffusionConfig, images: int = IMAGES, seed: int = 0) -> np.ndarray:
    """Return the bits/dim of each image [images], by the pipeline's losses, with the best model as the network."""
    process = make_process(diffusion)
    ids = torch.arange(images)
    x = MEAN + STD * normal(seed, 2**20, ids, Purpose.NOISE, PIXELS).double()
    x_0 = ((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1

    def model(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        bar = take(process.alpha_bar, t).double()[:, None, None, None]
        return (1 - bar).sqrt() / (bar * STD**2 + 1 - bar) * (x_t - bar.sqrt() * MEAN)

    terms, prior = vlb_terms(
        process, model, x_0, lambda t: normal(seed, t, ids, Purpose.BOUND, PIXELS).double()
    )
    return (terms.sum(dim=1) + prior).numpy()


class GaussianTrial(Trial):
    """A trial with a known model, which needs no training."""

    def advance(self) -> Rung:
        """Return the only rung, which is the end."""
        diffusion = training(self.job, self.record).diffusion
        totals = measured_bound(diffusion, seed=self.job.seed)
        metrics = {
            BITS_PER_DIM: float(totals.mean()),
            f"{BITS_PER_DIM}_stderr": float(totals.std(ddof=1) / math.sqrt(len(totals))),
        }
        return Rung(self.job.images, 1, 0.0, metrics, tuple(totals.tolist()))


class FailingTrial(GaussianTrial):
    """Trial 0 measures NaN. The processes of two others are killed or fail until the file `repaired` exists."""

    def advance(self) -> Rung:
        rung = super().advance()
        if self.record.number == 0:
            return replace(rung, metrics=rung.metrics | {BITS_PER_DIM: math.nan})
        if not (Path(self.job.output) / "repaired").exists():
            if self.record.number == 1:
                os._exit(1)
            if self.record.number == 2:
                raise OSError("the storage is away")
        return rung


class SlowTrial(GaussianTrial):
    """Removes the lock, as another driver does after this one was silent for too long."""

    def advance(self) -> Rung:
        (Path(self.job.output) / "lock.json").unlink(missing_ok=True)
        time.sleep(60)
        return super().advance()
