"""Data with known closed forms, Gaussians and discrete pixels, and their optimal epsilon.

Expectations are exact, not sampled. For a Gaussian the loss terms are quadratic in (x_0, noise), and a quadratic
function has the same mean over the sigma points of a standard normal as over the normal itself.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DiffusionConfig, Variance
from pipeline.diffusion.losses import Model
from pipeline.diffusion.process import Process, make_process


def process_of(timesteps: int = 12, variance: Variance = "fixed_small", schedule: str = "linear") -> Process:
    return make_process(DiffusionConfig(schedule=schedule, timesteps=timesteps, variance=variance))


def mild(variance: Variance) -> Process:
    """Return a chain of 8 steps that keeps part of the image, so that no term of its bound is tiny."""
    betas = tuple(np.linspace(0.02, 0.2, 8).tolist())
    return make_process(DiffusionConfig(schedule="explicit", timesteps=8, betas=betas, variance=variance))


def all_at(x: Tensor, t: int) -> Tensor:
    """Return step t for every image of x, [N]."""
    return torch.full((len(x),), t)


@dataclass(frozen=True)
class Chain:
    """The papers' coefficients in numpy, from the betas alone. Index 0 is t = 1."""

    beta: np.ndarray

    @property
    def alpha_bar(self) -> np.ndarray:
        return np.cumprod(1 - self.beta)

    @property
    def alpha_bar_prev(self) -> np.ndarray:
        return np.concatenate([[1.0], self.alpha_bar[:-1]])

    @property
    def beta_tilde(self) -> np.ndarray:
        return self.beta * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)


@dataclass(frozen=True)
class GaussianData:
    """x_0 ~ N(mean, axes diag(variances) axes^T), with images [N, D, 1, 1]."""

    mean: Tensor
    variances: Tensor
    axes: Tensor

    @property
    def dims(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        return self.axes @ self.variances.diag() @ self.axes.T

    def along_axes(self, vectors: Tensor) -> Tensor:
        """Rotate image vectors [N, D] to the coordinates in which the covariance is diagonal."""
        return vectors @ self.axes

    def x_t(self, z: Tensor, alpha_bar: float) -> Tensor:
        """Turn standard normal z [N, D] into draws of q(x_t)."""
        spread = (alpha_bar * self.variances + 1 - alpha_bar).sqrt()
        return image(alpha_bar**0.5 * self.mean + (z * spread) @ self.axes.T)

    def optimal_eps(self, process: Process) -> Model:
        """E[eps | x_t] = sqrt(1 - abar) (abar S + (1 - abar) I)^-1 (x_t - sqrt(abar) mean)."""

        def model(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            alpha_bar = process.alpha_bar[t][:, None]
            centred = self.along_axes(x_t.flatten(1) - alpha_bar.sqrt() * self.mean)
            scaled = centred / (alpha_bar * self.variances + 1 - alpha_bar)
            return image((1 - alpha_bar).sqrt() * (scaled @ self.axes.T))

        return model

    def posterior_variance(self, alpha_bar: np.ndarray) -> np.ndarray:
        """Return Var[x_0 | x_t] along the axes, [T, D]."""
        abar, variances = alpha_bar[:, None], self.variances.numpy()
        return variances * (1 - abar) / (abar * variances + 1 - abar)


def gaussian(dims: int = 3, seed: int = 0) -> GaussianData:
    """Return data with correlations, a mean off zero, and variances below and above one."""
    generator = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(generator.normal(size=(dims, dims)))
    return GaussianData(
        torch.from_numpy(generator.normal(size=dims)),
        torch.from_numpy(np.geomspace(0.05, 2, dims)),
        torch.from_numpy(axes),
    )


def image(vectors: Tensor) -> Tensor:
    return vectors[:, :, None, None]


def sigma_points(dims: int) -> Tensor:
    """Return float64 points [2 dims, dims] with mean 0 and covariance exactly the identity."""
    corners = torch.eye(dims, dtype=torch.float64) * dims**0.5
    return torch.cat([corners, -corners])


def joint(data: GaussianData, noises: int) -> tuple[Tensor, list[Tensor]]:
    """Return sigma points of x_0 and of several noises, all uncorrelated, as one batch of images."""
    first, *others = sigma_points(data.dims * (1 + noises)).split(data.dims, dim=1)
    return data.x_t(first, 1.0), [image(z) for z in others]


def moments(data: GaussianData, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return mean [D] and covariance [D, D] of equally likely images, along the data's axes."""
    x = data.along_axes(images.flatten(1)).numpy()
    return x.mean(axis=0), np.cov(x, rowvar=False, bias=True).reshape(x.shape[1], -1)


@dataclass(frozen=True)
class PixelData:
    """One-pixel images with grey value k of probability pmf[k]. Expectations are weighted sums.

    Attributes:
        x_0: every grey level in [-1, 1], paired with every node of the noise, [N, 1, 1, 1].
        noise: the node of each pair, [N, 1, 1, 1].
        weights: probability of each pair, [N].
    """

    pmf: Tensor
    x_0: Tensor
    noise: Tensor
    weights: Tensor

    @property
    def entropy(self) -> float:
        p = self.pmf[self.pmf > 0]
        return float(-(p * p.log2()).sum())

    def optimal(self, process: Process) -> Model:
        """Return a model of E[eps | x_t]. For a learned variance it also gives v for Var[x_{t-1} | x_t]."""
        levels = torch.arange(256, dtype=torch.float64)[self.pmf > 0] / 127.5 - 1
        log_p = self.pmf[self.pmf > 0].log()
        coefficient = process.posterior_mean_coef1.square()
        low, high = process.posterior_log_variance_clipped, process.beta.log()

        def model(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            alpha_bar = process.alpha_bar[t][:, None]
            distance = x_t.flatten(1) - alpha_bar.sqrt() * levels
            chance = (log_p - distance.square() / (2 * (1 - alpha_bar))).softmax(dim=1)
            guess = (chance @ levels)[:, None]
            eps = (x_t.flatten(1) - alpha_bar.sqrt() * guess) / (1 - alpha_bar).sqrt()
            if process.variance != "learned_range":
                return image(eps)
            rest = (chance @ levels.square())[:, None] - guess.square()
            variance = process.posterior_variance[t][:, None] + coefficient[t][:, None] * rest
            log_variance = variance.clamp(min=1e-8).log()
            v = 2 * (log_variance - low[t][:, None]) / (high - low)[t][:, None] - 1
            return image(torch.cat([eps, v], dim=1))

        return model

    def mean(self, values: Tensor) -> float:
        return float((self.weights * values).sum())


def pixels(pmf: np.ndarray, nodes: int) -> PixelData:
    """Return pixels with the noise at the `nodes` of Gauss-Hermite quadrature."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    levels = np.flatnonzero(pmf)
    x_0 = np.repeat(levels / 127.5 - 1, nodes)
    weights = np.repeat(pmf[levels], nodes) * np.tile(w / w.sum(), len(levels))
    column = [torch.from_numpy(v)[:, None, None, None] for v in (x_0, np.tile(z, len(levels)))]
    return PixelData(torch.from_numpy(pmf), *column, torch.from_numpy(weights))
