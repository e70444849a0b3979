"""The random numbers of `pipeline.rng` by two Triton kernels: one launch in place of hundreds.

The integer words are equal bit for bit, so decisions based on them are too. Normal numbers agree up to one unit in
the last place of float32, because the logarithm and the cosine are CUDA's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

_BLOCK = 256


@triton.jit
def _word(index, sample, epoch, purpose, key_low, key_high):
    """Word `index` of a sample's stream, as uint32."""
    counter = (index // 4).to(tl.uint32)
    low, high = (sample & 0xFFFFFFFF).to(tl.uint32), (sample >> 32).to(tl.uint32)
    stream = ((epoch << 8) | purpose).to(tl.uint32)
    a, b, c, d = philox_impl(
        counter, low + tl.zeros_like(counter), high + tl.zeros_like(counter), stream + tl.zeros_like(counter),
        key_low.to(tl.uint32), key_high.to(tl.uint32), 10,
    )  # fmt: skip
    lane = index % 4
    return tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))


# Triton compiles a kernel again for arguments that are 1 or a multiple of 16, except for those named here.
@triton.jit(do_not_specialize=["streams", "count", "key_low", "key_high"])
def _words_kernel(
    out, ids, epochs, purposes, streams, count, key_low, key_high,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, position = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sample, purpose = tl.load(ids + row // streams), tl.load(purposes + row % streams)
    word = _word(position, sample, tl.load(epochs + row // streams), purpose, key_low, key_high)
    tl.store(out + row.to(tl.int64) * count + position, word.to(tl.int64), mask=position < count)


@triton.jit(do_not_specialize=["purpose", "count", "pairs", "key_low", "key_high"])
def _normal_kernel(
    out, ids, epochs, purpose, count, pairs, key_low, key_high,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, pair = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sample, epoch = tl.load(ids + row), tl.load(epochs + row)
    first = _word(pair, sample, epoch, purpose, key_low, key_high).to(tl.float64)
    second = _word(pairs + pair, sample, epoch, purpose, key_low, key_high).to(tl.float64)
    step = tl.full((), 2.0**-32, tl.float64)
    turn = tl.full((), 6.283185307179586, tl.float64)
    radius = tl.sqrt(-2.0 * tl.log((first + 0.5) * step))
    angle = turn * ((second + 0.5) * step)
    start = out + row.to(tl.int64) * count
    tl.store(start + pair, (radius * tl.cos(angle)).to(tl.float32), mask=pair < pairs)
    tl.store(start + pairs + pair, (radius * tl.sin(angle)).to(tl.float32), mask=pairs + pair < count)


@torch.library.custom_op("ray_ddpm::words", mutates_args=())
def words(key: list[int], ids: Tensor, epochs: Tensor, purposes: Tensor, count: int) -> Tensor:
    """See `pipeline.rng.bits`: int64 [N, P, count] for `ids` and `epochs` int64 [N], `purposes` int64 [P]."""
    rows, streams = ids.numel(), purposes.numel()
    out = ids.new_empty(rows, streams, count)
    grid = (rows * streams, triton.cdiv(count, _BLOCK))
    _words_kernel[grid](out, ids, epochs, purposes, streams, count, *key, BLOCK=_BLOCK)
    return out


@torch.library.custom_op("ray_ddpm::normal", mutates_args=())
def normal(key: list[int], ids: Tensor, epochs: Tensor, purpose: int, count: int) -> Tensor:
    """See `pipeline.rng.normal`: float32 [N, count] for `ids` and `epochs` int64 [N]."""
    pairs = -(-count // 2)
    out = ids.new_empty(ids.numel(), count, dtype=torch.float32)
    grid = (ids.numel(), triton.cdiv(pairs, _BLOCK))
    _normal_kernel[grid](out, ids, epochs, purpose, count, pairs, *key, BLOCK=_BLOCK)
    return out


@words.register_fake
def _(key: list[int], ids: Tensor, epochs: Tensor, purposes: Tensor, count: int) -> Tensor:
    return ids.new_empty(ids.numel(), purposes.numel(), count)


@normal.register_fake
def _(key: list[int], ids: Tensor, epochs: Tensor, purpose: int, count: int) -> Tensor:
    return ids.new_empty(ids.numel(), count, dtype=torch.float32)
