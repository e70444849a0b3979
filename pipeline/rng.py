"""Counter-based noise: every random number is a pure function of (seed, epoch, sample id, purpose).

There is no generator state to save, lose or share: a resumed run, another number of workers or another
batch draws the same numbers for the same sample. The generator is Philox4x32-10 (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), vectorised over tensors on their own device; its integer
output is the same on CPU and GPU.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


class Purpose(IntEnum):
    """What a number is drawn for: streams of different purposes never overlap."""

    NOISE = 0
    TIMESTEP = 1
    LABEL_DROP = 2
    FLIP = 3
    SAMPLING = 6
    LABEL = 7
    EVALUATION = 8


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape, each element in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors of the same shape, each element in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two 32-bit numbers wraps in int64, but its 64 bits are right; the mask undoes the sign.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _MASK) ^ c1 ^ k0,
            product_1 & _MASK,
            ((product_0 >> 32) & _MASK) ^ c3 ^ k1,
            product_0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def bits(seed: int, epoch: int | Tensor, ids: Tensor, purpose: Purpose, count: int) -> Tensor:
    """`count` random 32-bit words for every sample.

    Args:
        seed: any integer; its low 64 bits are the key.
        epoch: in [0, 2^24); an int, or an int64 tensor of the shape of `ids`. Where samples are generated
            this is the sampling step.
        ids: sample ids, int64, shape [N], in [0, 2^63).
        purpose: which stream.
        count: words per sample.

    Returns:
        int64, shape [N, count], elements in [0, 2^32), on the device of `ids`.
    """
    blocks = -(-count // 4)
    shape = (ids.shape[0], blocks)
    block = torch.arange(blocks, device=ids.device).expand(shape)
    low, high = (ids & _MASK)[:, None].expand(shape), (ids >> 32)[:, None].expand(shape)
    stream = torch.as_tensor(epoch, device=ids.device, dtype=torch.int64) << 8 | int(purpose)
    stream = stream.reshape(-1, 1).expand(shape)
    words = philox4x32((block, low, high, stream), (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).reshape(ids.shape[0], -1)[:, :count]


def uniform(seed: int, epoch: int | Tensor, ids: Tensor, purpose: Purpose, count: int = 1) -> Tensor:
    """Uniform numbers strictly inside (0, 1): float64, shape [N, count], 32 random bits each."""
    return (bits(seed, epoch, ids, purpose, count).double() + 0.5) * 2.0**-32


def normal(seed: int, epoch: int | Tensor, ids: Tensor, purpose: Purpose, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers: float32, shape [N, *shape] (Box & Muller 1958, computed in float64)."""
    count = math.prod(shape)
    pairs = -(-count // 2)
    u = uniform(seed, epoch, ids, purpose, 2 * pairs)
    radius, angle = (-2.0 * u[:, :pairs].log()).sqrt(), (2.0 * math.pi) * u[:, pairs:]
    pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pair[:, :count].float().reshape(ids.shape[0], *shape)
