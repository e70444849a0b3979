"""Training objectives and the variational bound (Ho et al. 2020, section 3; Nichol & Dhariwal 2021).

The bound on the negative log-likelihood is L_T + sum of L_{t-1} + L_0, in bits per dimension unless stated otherwise.
See `pipeline.diffusion.process` for the counting of t: L_0 is the term at index t = 0.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.config import DiffusionConfig
from pipeline.diffusion.process import (
    Process,
    model_log_variance,
    p_mean_variance,
    q_mean_variance,
    q_posterior,
    q_sample,
    snr,
    take,
)
from pipeline.errors import InputError

# Share of the probability that decoders and codes give to pixel values that did not occur in training.
UNSEEN = 1e-3

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Function (x_t [N, C, ...], t of the original chain int64 [N], labels int64 [N] or None) -> epsilon, or epsilon and v"""


def check_loss(config: DiffusionConfig) -> None:
    """Checks that the objective trains what the model predicts.

    Raises:
        InputError: the variance is learned but the loss does not train it, or the reverse.
    """
    learned = config.variance == "learned_range"
    if learned and config.loss not in ("vlb", "hybrid"):
        raise InputError(f"--loss {config.loss} does not train --variance learned_range: use hybrid or vlb")
    if config.loss == "hybrid" and not learned:
        raise InputError(f"--loss hybrid trains --variance learned_range, not {config.variance}: use simple")


def training_loss(
    process: Process,
    config: DiffusionConfig,
    model: Model,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """The loss of each sample; its mean over uniform t is the objective.

    simple: ||noise - eps||^2, mean over dimensions (Ho et al. 2020, equation 14).
    weighted: `simple` times T and `vlb_coefficient`, its weight in the bound, bits/dim (Ho et al. 2020, equation 12).
    vlb: T times `vlb_term`, the bound without the constant L_T, bits/dim (Ho et al. 2020, equation 5).
    hybrid: simple + vlb_weight * vlb, where vlb trains only the variance (Nichol & Dhariwal 2021, equation 16).
    min_snr: `simple` times min(SNR, gamma) / SNR (Hang et al. 2023, section 3.4).

    Args:
        x_0: images in [-1, 1], [N, C, ...].
        t: step of each image, int64 [N].
        noise: standard normal noise, of x_0's shape.
        labels: int64 [N], or None for an unconditional model.

    Returns:
        losses [N], in x_0's dtype.

    Raises:
        InputError: as `check_loss`.
    """
    check_loss(config)
    x_t = q_sample(process, x_0, t, noise)
    output = model(x_t, take(process.timesteps, t), labels)
    if config.loss == "vlb":
        return len(process) * vlb_term(process, output, x_0, x_t, t, clip=False)
    eps = output[:, : x_0.shape[1]]
    simple = _mean_flat((noise - eps.to(noise.dtype)).square())
    if config.loss == "weighted":
        weight = len(process) * vlb_coefficient(process) / math.log(2)
        return take(weight, t).to(simple.dtype) * simple
    if config.loss == "min_snr":
        weight = (config.min_snr_gamma / snr(process)).clamp(max=1)
        return take(weight, t).to(simple.dtype) * simple
    if config.loss == "hybrid":
        frozen_mean = torch.cat([eps.detach(), output[:, x_0.shape[1] :]], dim=1)
        vlb = len(process) * vlb_term(process, frozen_mean, x_0, x_t, t, clip=False)
        return simple + config.vlb_weight * vlb
    return simple


def vlb_coefficient(process: Process) -> Tensor:
    """The factor of ||noise - eps||^2 in L_{t-1}: beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)) (equation 12).

    Returns:
        float64 [T], in nats. At t = 0 it is the factor of the decoder's Gaussian, as in Ho et al. 2020, section 3.4.

    Raises:
        InputError: the variance is learned, so the factor depends on the model.
    """
    variance = model_log_variance(process).exp()
    return process.beta**2 / (2 * variance * process.alpha * (1 - process.alpha_bar))


def vlb_term(
    process: Process, model_output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, clip: bool
) -> Tensor:
    """L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), or at t = 0 L_0 = -log p(x_0 | x_1) (eq. 5).

    Returns:
        bits/dim, [N].
    """
    q = q_posterior(process, x_0, x_t, t)
    p = p_mean_variance(process, model_output, x_t, t, clip)
    kl = normal_kl(q.mean, q.log_variance, p.mean, p.log_variance)
    decoder = -discretized_gaussian_log_likelihood(x_0, p.mean, p.log_variance / 2)
    return torch.where(t == 0, _mean_flat(decoder), _mean_flat(kl)) / math.log(2)


def prior_bits_per_dim(process: Process, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in bits/dim, [N]. It does not depend on the model."""
    t = torch.full((x_0.shape[0],), len(process) - 1, device=x_0.device)
    # Computed in float64, because the KL is a small difference of terms near 1.
    q = q_mean_variance(process, x_0.double(), t)
    zero = torch.zeros_like(q.mean)
    return (_mean_flat(normal_kl(q.mean, q.log_variance, zero, zero)) / math.log(2)).to(x_0.dtype)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) of each element, in nats; inf if the dtype can't hold it."""
    difference = log_variance1 - log_variance2
    # Scaled before squaring, and by a finite number, so that equal means have distance 0 for any variance.
    distance = (mean1 - mean2) * (-log_variance2 / 2).clamp(max=_largest_exponent(mean1.dtype)).exp()
    return 0.5 * (difference.expm1() - difference + distance.square())


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """The log-probability of each pixel's bin under N(mean, exp(log_scale)^2), in nats (Ho et al. 2020, equation 13).

    Args:
        x: 8-bit pixels scaled to [-1, 1]. Bins are 2/255 wide; the bins of -1 and 1 extend to infinity.
    """
    narrowness = (-log_scale).clamp(max=_largest_exponent(x.dtype)).exp()
    # Edges are clamped so that their squares stay finite; the difference of two infinities would be NaN.
    farthest = math.sqrt(torch.finfo(x.dtype).max)
    upper, lower = (((x + side / 255 - mean) * narrowness).clamp(-farthest, farthest) for side in (1, -1))
    # A bin above the mean is mirrored, so that both tail probabilities are small and exact.
    mirrored = lower + upper > 0
    high, low = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    log_high = torch.special.log_ndtr(high)
    # The floor keeps the gradient finite if the dtype can't distinguish the two edges.
    gap = (log_high - torch.special.log_ndtr(low)).clamp(min=torch.finfo(x.dtype).tiny)
    inside = log_high + (-torch.expm1(-gap)).log()
    lowest, highest = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    return torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, inside))


def softmax_decoder_bits(process: Process, x_0: Tensor, x_1: Tensor, occurs: Tensor) -> Tensor:
    """L_0 of a decoder without a network (Kingma et al. 2021, section 3.3).

    The probability p(x_0 | x_1) of a value is proportional to q(x_1 | value), over the values that occur. A share
    UNSEEN of the probability covers all 256 values, so that a value that never occurred costs a finite number of
    bits. The decoder has no parameters, so models of all schedules share it, and it fits the L_{t-1} of any network.

    Args:
        x_0: 8-bit images scaled to [-1, 1], [N, C, ...].
        x_1: drawn from q(x_1 | x_0) at index t = 0.
        occurs: bool [256], True for each pixel value that occurs in the training images.

    Returns:
        bits/dim, [N].
    """
    alpha_bar = process.alpha_bar[0].item()
    values = (torch.arange(256, device=x_0.device, dtype=torch.float64) / 127.5 - 1) * math.sqrt(alpha_bar)
    numbers = ((x_0 + 1) * 127.5).round().long()
    bits = []
    # One image at a time, because each pixel needs 256 numbers.
    for image, noisy in zip(numbers.flatten(1), x_1.double().flatten(1), strict=True):
        logits = -(noisy[:, None] - values).square() / (2 * (1 - alpha_bar))
        chances = [logits, logits.where(occurs.to(x_0.device), -math.inf)]
        every, some = (chance.log_softmax(1).gather(1, image[:, None]) for chance in chances)
        log_p = torch.logaddexp(some + math.log1p(-UNSEEN), every + math.log(UNSEEN))
        bits.append(-log_p.mean() / math.log(2))
    return torch.stack(bits).to(x_0.dtype)


def _largest_exponent(dtype: torch.dtype) -> float:
    """The largest whole number whose exponential is finite in a dtype."""
    return math.floor(math.log(torch.finfo(dtype).max))


@torch.no_grad()
def vlb_terms(
    process: Process,
    model: Model,
    x_0: Tensor,
    noise_fn: Callable[[int], Tensor],
    labels: Tensor | None = None,
    clip: bool = True,
) -> tuple[Tensor, Tensor]:
    """All terms of the bound, with one draw of noise each.

    Args:
        x_0: 8-bit images scaled to [-1, 1], [N, C, ...].
        noise_fn: returns standard normal noise of x_0's shape for step t.
        clip: limit the predicted x_0 to [-1, 1].

    Returns:
        terms [N, T], with the term of step t in column t, and the prior L_T [N], both in bits/dim. An image's
        bits/dim is terms.sum(1) + prior.
    """
    columns = [
        _term(
            process, model, x_0, torch.full((x_0.shape[0],), t, device=x_0.device), noise_fn(t), labels, clip
        )
        for t in range(len(process))
    ]
    return torch.stack(columns, dim=1), prior_bits_per_dim(process, x_0)


@torch.no_grad()
def stratified_vlb(
    process: Process,
    model: Model,
    x_0: Tensor,
    noise_fn: Callable[[Tensor], Tensor],
    u: Tensor,
    labels: Tensor | None = None,
    clip: bool = True,
) -> tuple[Tensor, Tensor]:
    """An unbiased estimate of each image's bits/dim from n of the T terms.

    The steps are divided into n / 2 strata, and each image draws two different steps from each. The terms fall
    roughly as 1 / t, so the strata grow with t. The first strata hold two steps each and are evaluated whole.

    Args:
        x_0: 8-bit images scaled to [-1, 1], [N, C, ...].
        noise_fn: returns standard normal noise of x_0's shape for steps t int64 [N], one for each image.
        u: uniform numbers in (0, 1), float64, [N, n], n even and from 2 to T.

    Returns:
        bits/dim including L_T, and the variance of this estimate around the sum of all terms with the same noise:
        both [N]. The mean over independent images has standard error sqrt(variance.sum()) / N due to the choice of
        terms. With n = T (even), all terms are evaluated and the variance is zero.

    Raises:
        InputError: n is odd or outside 2 to T.
    """
    count, timesteps = u.shape[1], len(process)
    if count % 2 or not 2 <= count <= timesteps:
        raise InputError(f"terms of the bound: {count} isn't an even number from 2 to {timesteps}")
    total = prior_bits_per_dim(process, x_0)
    variance = torch.zeros_like(total)
    for stratum, (start, end) in enumerate(pairwise(_strata(timesteps, count // 2))):
        size = end - start
        first = (u[:, 2 * stratum] * size).long()
        second = (first + 1 + (u[:, 2 * stratum + 1] * (size - 1)).long()) % size
        a, b = (
            _term(process, model, x_0, start + offset, noise_fn(start + offset), labels, clip)
            for offset in (first, second)
        )
        total = total + size * (a + b) / 2
        # Two draws without replacement: s^2 / 2 with the finite-population correction, where s^2 = (a - b)^2 / 2.
        variance = variance + size**2 * (1 - 2 / size) * (a - b).square() / 4
    return total, variance


def _strata(timesteps: int, count: int) -> list[int]:
    """Edges from 0 to T of `count` intervals of at least two steps, which grow geometrically where possible."""
    edges = [0]
    for i in range(count):
        wanted = round(2 * (timesteps / 2) ** (i / (count - 1))) if count > 1 else timesteps
        edges.append(min(max(wanted, edges[-1] + 2), timesteps - 2 * (count - 1 - i)))
    return edges


def _term(
    process: Process, model: Model, x_0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None, clip: bool
) -> Tensor:
    x_t = q_sample(process, x_0, t, noise)
    return vlb_term(process, model(x_t, take(process.timesteps, t), labels), x_0, x_t, t, clip)


def _mean_flat(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
