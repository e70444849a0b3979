"""A batch as the network gets it. Plain torch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prepared:
    """A batch on the device with everything random about it drawn."""

    x_0: Tensor
    t: Tensor
    noise: Tensor
    labels: Tensor | None
    weights: Tensor
