"""Averages of the weights: standard EMA with several decays at once, and the power-function profiles of EDM2.

Only parameters are averaged. Lists of tensors are in the order of `model.parameters()`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import InputError


class Averages:
    """Averages of parameters, on the parameters' device or in main memory.

    Averages in main memory lag one step behind until they are read. A GPU copies the parameters to main memory
    between two steps, and the CPU averages them while the GPU computes the next step. Neither waits for the other.

    Args:
        parameters: the parameters to average.
        count: number of averages.
        apart: keep the averages in main memory.
    """

    def __init__(self, parameters: Sequence[Tensor], count: int, apart: bool = False) -> None:
        self._parameters = list(parameters)
        self._tensors = init(self._parameters, count, torch.device("cpu") if apart else None)
        self._copies = [
            torch.empty_like(p, device="cpu", pin_memory=p.is_cuda) for p in self._parameters if apart
        ]
        self._due: list[float] | None = None
        self._copied = torch.cuda.Event() if apart and self._parameters[0].is_cuda else None

    @property
    def tensors(self) -> list[list[Tensor]]:
        """The averages with all updates applied, each in the order of the parameters."""
        self._finish()
        return self._tensors

    @torch.no_grad()
    def update_(self, decays: list[float]) -> None:
        """Applies the function `update_` with the current parameters. `decays` has one value for each average."""
        if not self._copies:
            update_(self._tensors, self._parameters, decays)
            return
        self._finish()
        for copy, parameter in zip(self._copies, self._parameters, strict=True):
            copy.copy_(parameter, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._due = decays

    def _finish(self) -> None:
        if self._due is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        update_(self._tensors, self._copies, self._due)
        self._due = None


def init(parameters: list[Tensor], count: int, device: torch.device | None = None) -> list[list[Tensor]]:
    """`count` averages that start as copies of the parameters, on the same or another device."""
    return [[p.detach().to(device or p.device, copy=True) for p in parameters] for _ in range(count)]


@torch.no_grad()
def update_(averages: list[list[Tensor]], parameters: list[Tensor], decays: list[float]) -> None:
    """average <- decay * average + (1 - decay) * parameter, in place, for each (average, decay) pair."""
    for average, decay in zip(averages, decays, strict=True):
        torch._foreach_lerp_(average, parameters, 1.0 - decay)


def power_gamma(sigma_rel: float) -> float:
    """The exponent gamma of the profile tau^gamma whose relative standard deviation is `sigma_rel`.

    Karras et al. 2024 ("Analyzing and Improving the Training Dynamics of Diffusion Models"), algorithm 2.

    Raises:
        InputError: `sigma_rel` is outside (0, 0.28], where no profile with gamma >= 0 exists.
    """
    if not 0 < sigma_rel <= 0.28:
        raise InputError(f"EMA length {sigma_rel} is outside 0 to 0.28 (a share of the training so far)")
    t = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def power_decay(sigma_rel: float, step: int) -> float:
    """The decay of a power-function average at `step`, counted from 1 (Karras et al. 2024, equation 127)."""
    return float((1.0 - 1.0 / step) ** (power_gamma(sigma_rel) + 1.0))


def reconstruction_weights(
    steps: list[int], sigma_rels: list[float], step: int, sigma_rel: float
) -> list[float]:
    """Weights that mix stored averages into one of another length (Karras et al. 2024, section 3.2).

    Args:
        steps, sigma_rels: step and relative length of each stored average.
        step, sigma_rel: step and relative length of the wanted average.

    Returns:
        one weight for each stored average: the least-squares fit of the wanted profile among weights that sum to one.
            Without this constraint, few snapshots would give weights whose sum is not one, and so a network scaled as
            a whole.
    """
    # Times are in units of `step`, so that the inner products and the ones of the constraint have similar size.
    stored = [(s / step, power_gamma(r)) for s, r in zip(steps, sigma_rels, strict=True)]
    wanted = (1.0, power_gamma(sigma_rel))
    ones = np.ones((len(stored), 1))
    gram = np.array([[_inner(a, b) for b in stored] for a in stored])
    # The last unknown is the constraint's Lagrange multiplier.
    system = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])
    solution, *_ = np.linalg.lstsq(system, np.array([*(_inner(a, wanted) for a in stored), 1.0]), rcond=None)
    return [float(w) for w in solution[:-1]]


def _inner(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The inner product of two profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]."""
    (t_a, gamma_a), (t_b, gamma_b) = a, b
    least = min(t_a, t_b)
    # Computed in logarithms, because t^gamma overflows long before the ratio does.
    exponent = (
        (gamma_a + gamma_b + 1) * np.log(least) - (gamma_a + 1) * np.log(t_a) - (gamma_b + 1) * np.log(t_b)
    )
    return float((gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * np.exp(exponent))
