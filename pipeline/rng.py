"""Counter-based noise: every random number is a pure function of (seed, epoch, sample id, purpose).

There is no generator state to save, lose or share: a resumed run, another number of workers or another
batch draws the same numbers for the same sample. The generator is Philox4x32-10 (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), vectorised over tensors on their own device; its integer
output is the same on CPU and GPU.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from pipeline.gpu import available

EPOCHS = 2**24
"""Number of epochs, or of sampling steps, with distinct random numbers."""
_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


class Purpose(IntEnum):
    """The use of a random number. Streams of different purposes never overlap.

    Each purpose is used in one place only, so no number serves two uses: the number that chooses an image must not be
    its noise.
    """

    NOISE = 0
    TIMESTEP = 1
    LABEL_DROP = 2
    FLIP = 3
    SAMPLING = 6
    LABEL = 7
    BOUND = 8
    BOUND_TERMS = 9
    IMAGES = 10
    CLASSIFIER_BATCH = 11
    KERNEL_SUBSETS = 12
    DROPOUT = 13
    CLASSIFIER_WEIGHTS = 14


class Choice(IntEnum):
    """Reasons for choosing images at random. Each is an epoch of `Purpose.IMAGES`, so no two share random numbers."""

    BOUND = 0
    CLASSIFIER = 1
    CLASSIFIER_TEST = 2
    FEATURES = 3
    CODES = 4


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Sequence[int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011).

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
        epoch: in [0, 2^24); an int, or an int64 tensor of the shape of `ids`. When samples are generated, this is the
            sampling step.
        ids: sample ids, int64, shape [N], in [0, 2^63).
        purpose: stream to draw from.
        count: words per sample.

    Returns:
        int64, shape [N, count], elements in [0, 2^32), on the device of `ids`.
    """
    return _words(seed, epoch, ids, (purpose,), count)[:, 0]


def uniform(seed: int, epoch: int | Tensor, ids: Tensor, purpose: Purpose, count: int = 1) -> Tensor:
    """Uniform numbers strictly inside (0, 1): float64, shape [N, count], with 32 random bits each."""
    return _inside(bits(seed, epoch, ids, purpose, count))


def uniforms(
    seed: int, epoch: int | Tensor, ids: Tensor, purposes: tuple[Purpose, ...]
) -> dict[Purpose, Tensor]:
    """The first number of `uniform` for several purposes, drawn together: float64 [N] for each."""
    columns = _inside(_words(seed, epoch, ids, purposes, 1)[:, :, 0]).T.contiguous().unbind()
    return dict(zip(purposes, columns, strict=True))


def normal(seed: int, epoch: int | Tensor, ids: Tensor, purpose: Purpose, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers: float32, shape [N, *shape] (Box & Muller 1958, computed in float64)."""
    count = math.prod(shape)
    if not ids.is_cpu and available.work():
        from pipeline.gpu import philox

        numbers = philox.normal(_key(seed), ids, _epochs(epoch, ids), int(purpose), count)
        return numbers.reshape(ids.shape[0], *shape)
    pairs = -(-count // 2)
    u = uniform(seed, epoch, ids, purpose, 2 * pairs)
    radius, angle = (-2.0 * u[:, :pairs].log()).sqrt(), (2.0 * math.pi) * u[:, pairs:]
    pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pair[:, :count].float().reshape(ids.shape[0], *shape)


def generator_seed(seed: int, epoch: int, number: int, purpose: Purpose) -> int:
    """A seed in [0, 2^64) for code that can only draw from a torch generator, such as dropout."""
    low, high = bits(seed, epoch, torch.tensor([number]), purpose, 2)[0].tolist()
    return int(high << 32 | low)


def _words(seed: int, epoch: int | Tensor, ids: Tensor, purposes: tuple[Purpose, ...], count: int) -> Tensor:
    """`bits` for each of P purposes: int64 [N, P, count]."""
    purpose = _column(purposes, ids.device)
    if not ids.is_cpu and available.work():
        from pipeline.gpu import philox

        return philox.words(_key(seed), ids, _epochs(epoch, ids), purpose, count)
    blocks = -(-count // 4)
    shape = (ids.shape[0], len(purposes), blocks)
    block = torch.arange(blocks, device=ids.device).expand(shape)
    low, high = (part[:, None, None].expand(shape) for part in (ids & _MASK, ids >> 32))
    stream = (_epochs(epoch, ids)[:, None] << 8 | purpose)[:, :, None].expand(shape)
    words = philox4x32((block, low, high, stream), _key(seed))
    return torch.stack(words, dim=-1).flatten(2)[:, :, :count]


@cache
def _column(purposes: tuple[Purpose, ...], device: torch.device) -> Tensor:
    """The purposes as a tensor. It is cached, because a GPU would have to wait for the copy."""
    return torch.tensor(purposes, dtype=torch.int64, device=device)


def _key(seed: int) -> list[int]:
    return [seed & _MASK, (seed >> 32) & _MASK]


def _epochs(epoch: int | Tensor, ids: Tensor) -> Tensor:
    return epoch.to(torch.int64) if isinstance(epoch, Tensor) else torch.full_like(ids, epoch)


def _inside(words: Tensor) -> Tensor:
    return (words.double() + 0.5) * 2.0**-32
