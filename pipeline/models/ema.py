"""Averages of the weights: standard EMA at several decays at once, and EDM2's power-function profiles.

Only parameters are averaged. `init` and `update_` work on lists of tensors in the order of `model.parameters()`.
A snapshot is a power-function average as it stood at some step, in a file whose name says which; from the
snapshots of one or two lengths the average of any other length is reconstructed after the training.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import InputError


def init(parameters: list[Tensor], count: int) -> list[list[Tensor]]:
    """`count` averages that start as copies of the parameters."""
    return [[p.detach().clone() for p in parameters] for _ in range(count)]


@torch.no_grad()
def update_(averages: list[list[Tensor]], parameters: list[Tensor], decays: list[float]) -> None:
    """average <- decay * average + (1 - decay) * parameter, in place, for each (average, decay) pair."""
    for average, decay in zip(averages, decays, strict=True):
        torch._foreach_lerp_(average, parameters, 1.0 - decay)


def power_gamma(sigma_rel: float) -> float:
    """The exponent of the profile tau^gamma whose relative standard deviation is `sigma_rel`.

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
    """How to mix stored averages into one of another length (Karras et al. 2024, section 3.2).

    Args:
        steps, sigma_rels: when each stored average was taken, and its length.
        step, sigma_rel: of the average that is wanted.

    Returns:
        one weight for each stored average: the least-squares fit of the wanted profile.
    """
    stored = [(float(s), power_gamma(r)) for s, r in zip(steps, sigma_rels, strict=True)]
    wanted = (float(step), power_gamma(sigma_rel))
    gram = np.array([[_inner(a, b) for b in stored] for a in stored])
    solution, *_ = np.linalg.lstsq(gram, np.array([_inner(a, wanted) for a in stored]), rcond=None)
    return [float(w) for w in solution]


@dataclass(frozen=True)
class Snapshot:
    """When a stored average was taken, and its relative length."""

    step: int
    sigma_rel: float

    @property
    def name(self) -> str:
        """Its file's name."""
        return f"step-{self.step:09d}-length-{self.sigma_rel:g}.safetensors"


def parse_snapshot(name: str) -> Snapshot | None:
    """The inverse of `Snapshot.name`; None for any other file."""
    found = re.fullmatch(r"step-(\d+)-length-([\d.e-]+)\.safetensors", name)
    return Snapshot(int(found[1]), float(found[2])) if found else None


def reconstruct(
    snapshots: list[Snapshot], read: Callable[[Snapshot], dict[str, Tensor]], sigma_rels: list[float]
) -> list[dict[str, Tensor]]:
    """Averages of any lengths at the newest step, mixed from stored ones.

    Args:
        read: the tensors of a snapshot by name; called once for each, and one at a time is held in memory.
        sigma_rels: the lengths that are wanted.

    Returns:
        the parameters by name for each length, of the snapshots' dtype.
    """
    steps, lengths = [s.step for s in snapshots], [s.sigma_rel for s in snapshots]
    mixes = [reconstruction_weights(steps, lengths, max(steps), wanted) for wanted in sigma_rels]
    sums: list[dict[str, Tensor]] = [{} for _ in sigma_rels]
    dtypes: dict[str, torch.dtype] = {}
    for i, snapshot in enumerate(snapshots):
        for name, tensor in read(snapshot).items():
            dtypes[name] = tensor.dtype
            for mix, total in zip(mixes, sums, strict=True):
                # In float64: the weights may be large and of both signs.
                total[name] = total.get(name, 0) + mix[i] * tensor.double()
    return [{name: tensor.to(dtypes[name]) for name, tensor in total.items()} for total in sums]


def _inner(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The inner product of two profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]."""
    (t_a, gamma_a), (t_b, gamma_b) = a, b
    least = min(t_a, t_b)
    # In logarithms: t^gamma overflows long before the ratio does.
    exponent = (
        (gamma_a + gamma_b + 1) * np.log(least) - (gamma_a + 1) * np.log(t_a) - (gamma_b + 1) * np.log(t_b)
    )
    return float((gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * np.exp(exponent))
