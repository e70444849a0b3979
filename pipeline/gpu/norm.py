"""Group norm, scale and shift, and SiLU as one Triton kernel each for forward and backward, on channels_last images.

torch's CUDA kernel needs contiguous images, so it copies every image to that layout and back. SiLU and modulation
read and write the images once more each. Together this took more than half of a step's time on a GPU.

A program handles some groups of one image. It reads them twice, the second time from the cache, and writes them once.
Sums are in float32 for every dtype of the images.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS_OF_A_THREAD = 16


@triton.jit
def _columns(GROUPS_HERE: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """For the columns of a tile: their channels, True if the channel exists, and their membership in groups [G, C]."""
    column = tl.arange(0, COLUMNS)
    belongs = column[None, :] // GROUP == tl.arange(0, GROUPS_HERE)[:, None]
    return tl.program_id(1) * (GROUPS_HERE * GROUP) + column, column < GROUPS_HERE * GROUP, belongs


@triton.jit
def _groups_here(GROUPS_HERE: tl.constexpr):
    """Indices of the statistics of this program's groups."""
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    return program * GROUPS_HERE + tl.arange(0, GROUPS_HERE)


@triton.jit
def _group_sums(values, belongs):
    return tl.sum(tl.where(belongs, values[None, :], 0.0), axis=1)


@triton.jit
def _of_groups(values, belongs):
    """Repeats each group's value for each of its columns."""
    return tl.sum(tl.where(belongs, values[:, None], 0.0), axis=0)


@triton.jit
def _factors(
    before, weight, bias, scale, shift,
    stride, channel, exists, BEFORE: tl.constexpr, MODULATED: tl.constexpr,
):  # fmt: skip
    """For each column: what is added before the norm, its weight and bias, and (1 + scale) and shift of this image."""
    w = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    first, factor, offset = tl.zeros_like(w), tl.full(w.shape, 1.0, tl.float32), tl.zeros_like(w)
    if BEFORE:
        first += tl.load(before + channel, mask=exists, other=0.0).to(tl.float32)
    if MODULATED:
        row = tl.program_id(0).to(tl.int64) * stride
        factor += tl.load(scale + row + channel, mask=exists, other=0.0).to(tl.float32)
        offset += tl.load(shift + row + channel, mask=exists, other=0.0).to(tl.float32)
    return first, w, b, factor, offset


@triton.jit
def _sigmoid(u, FAST: tl.constexpr):
    """The sigmoid of u. FAST takes four instructions in place of a dozen; its error is far below bf16's rounding."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [1.0 + tl.exp2(u * -1.4426950408889634)],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.sigmoid(u)


@triton.jit
def _load(pointer, there, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointer)
    return tl.load(pointer, mask=there, other=0.0)


@triton.jit
def _store(pointer, values, there, FULL: tl.constexpr):
    values = values.to(pointer.dtype.element_ty)
    if FULL:
        tl.store(pointer, values)
    else:
        tl.store(pointer, values, mask=there)


@triton.jit
def _normalised(x, slope, constant, FAST: tl.constexpr, SILU: tl.constexpr):
    u = x.to(tl.float32) * slope[None, :] + constant[None, :]
    return u * _sigmoid(u, FAST) if SILU else u


@triton.jit
def _forward_kernel(
    x, y, before, weight, bias, scale, shift,
    stride, means, rstds, channels, eps,
    PIXELS: tl.constexpr, GROUPS_HERE: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, BEFORE: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    channel, exists, belongs = _columns(GROUPS_HERE, GROUP, COLUMNS)
    start = tl.program_id(0).to(tl.int64) * PIXELS * channels
    row = tl.arange(0, ROWS)[:, None]
    # A tile of the whole image stays in registers.
    WHOLE: tl.constexpr = ROWS >= PIXELS
    if WHOLE:
        there, place = (row < PIXELS) & exists[None, :], start + row * channels + channel[None, :]
        tile = _load(x + place, there, FULL)
        values = tile.to(tl.float32)
        total, squares = tl.sum(values, axis=0), tl.sum(values * values, axis=0)
    else:
        totals = tl.zeros([ROWS, COLUMNS], tl.float32)
        all_squares = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in tl.range(0, PIXELS, ROWS, num_stages=STAGES):
            there = (begin + row < PIXELS) & exists[None, :]
            values = _load(x + start + (begin + row) * channels + channel[None, :], there, FULL).to(
                tl.float32
            )
            totals += values
            all_squares += values * values
        total, squares = tl.sum(totals, axis=0), tl.sum(all_squares, axis=0)
    first, w, b, factor, offset = _factors(
        before, weight, bias, scale, shift, stride, channel, exists, BEFORE, MODULATED
    )
    squares += first * (2.0 * total + PIXELS * first)
    total += PIXELS * first
    mean = _group_sums(total, belongs) / (PIXELS * GROUP)
    variance = _group_sums(squares, belongs) / (PIXELS * GROUP) - mean * mean
    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    here = _groups_here(GROUPS_HERE)
    tl.store(means + here, mean)
    tl.store(rstds + here, rstd)
    slope = _of_groups(rstd, belongs) * w
    constant = (b + (first - _of_groups(mean, belongs)) * slope) * factor + offset
    slope = slope * factor
    if WHOLE:
        _store(y + place, _normalised(tile, slope, constant, FAST, SILU), there, FULL)
    else:
        for begin in tl.range(0, PIXELS, ROWS, num_stages=STAGES):
            there = (begin + row < PIXELS) & exists[None, :]
            place = start + (begin + row) * channels + channel[None, :]
            _store(
                y + place,
                _normalised(_load(x + place, there, FULL), slope, constant, FAST, SILU),
                there,
                FULL,
            )


@triton.jit
def _before_silu(values, du, slope, constant, FAST: tl.constexpr, SILU: tl.constexpr):
    """The gradient of u, the input of SiLU, in float32."""
    du = du.to(tl.float32)
    if SILU:
        u = values * slope[None, :] + constant[None, :]
        s = _sigmoid(u, FAST)
        du = du * (s + (u * s) * (1.0 - s))
    return du


@triton.jit
def _backward_kernel(
    dy, x, dx, before, weight, bias,
    scale, shift, stride, means, rstds, of_parameters,
    channels,
    PIXELS: tl.constexpr, GROUPS_HERE: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, BEFORE: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    channel, exists, belongs = _columns(GROUPS_HERE, GROUP, COLUMNS)
    start = tl.program_id(0).to(tl.int64) * PIXELS * channels
    row = tl.arange(0, ROWS)[:, None]
    here = _groups_here(GROUPS_HERE)
    first, w, b, factor, offset = _factors(
        before, weight, bias, scale, shift, stride, channel, exists, BEFORE, MODULATED
    )
    mean = _of_groups(tl.load(means + here), belongs) - first
    rstd = _of_groups(tl.load(rstds + here), belongs)
    slope = rstd * w * factor
    constant = (b - mean * rstd * w) * factor + offset
    # Sums over the pixels of x, du and du x.
    WHOLE: tl.constexpr = ROWS >= PIXELS
    if WHOLE:
        there, place = (row < PIXELS) & exists[None, :], start + row * channels + channel[None, :]
        tile, of_tile = _load(x + place, there, FULL), _load(dy + place, there, FULL)
        values = tile.to(tl.float32)
        du = _before_silu(values, of_tile, slope, constant, FAST, SILU)
        sum_x, sum_du, sum_du_x = tl.sum(values, axis=0), tl.sum(du, axis=0), tl.sum(du * values, axis=0)
    else:
        total_x = tl.zeros([ROWS, COLUMNS], tl.float32)
        total_du = tl.zeros([ROWS, COLUMNS], tl.float32)
        total_du_x = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in tl.range(0, PIXELS, ROWS, num_stages=STAGES):
            there = (begin + row < PIXELS) & exists[None, :]
            place = start + (begin + row) * channels + channel[None, :]
            values = _load(x + place, there, FULL).to(tl.float32)
            du = _before_silu(values, _load(dy + place, there, FULL), slope, constant, FAST, SILU)
            if BEFORE:
                total_x += values
            total_du += du
            total_du_x += du * values
        sum_x, sum_du, sum_du_x = (
            tl.sum(total_x, axis=0),
            tl.sum(total_du, axis=0),
            tl.sum(total_du_x, axis=0),
        )
    sum_du_n = (sum_du_x - mean * sum_du) * rstd  # n: the normalised image
    # dx = slope du - rstd (mean(dn) + n mean(dn n)), with dn = du factor w.
    count = PIXELS * GROUP
    of_mean = _of_groups(_group_sums(sum_du * factor * w, belongs), belongs) / count
    of_n = _of_groups(_group_sums(sum_du_n * factor * w, belongs), belongs) / count
    of_x = -rstd * rstd * of_n
    rest = -rstd * of_mean - mean * of_x
    # Gradients of weight and bias, of what is added first, and of scale and shift, for this image: [5, N, C].
    size = tl.num_programs(0).to(tl.int64) * channels
    parameters = of_parameters + tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(parameters, sum_du_n * factor, mask=exists)
    tl.store(parameters + size, sum_du * factor, mask=exists)
    if BEFORE:
        tl.store(parameters + 2 * size, sum_du * slope + sum_x * of_x + PIXELS * rest, mask=exists)
    if MODULATED:
        of_scale = parameters + (3 * size if BEFORE else 2 * size)
        tl.store(of_scale, sum_du_n * w + sum_du * b, mask=exists)
        tl.store(of_scale + size, sum_du, mask=exists)
    if WHOLE:
        _store(dx + place, du * slope[None, :] + values * of_x[None, :] + rest[None, :], there, FULL)
    else:
        for begin in tl.range(0, PIXELS, ROWS, num_stages=STAGES):
            there = (begin + row < PIXELS) & exists[None, :]
            place = start + (begin + row) * channels + channel[None, :]
            values = _load(x + place, there, FULL).to(tl.float32)
            du = _before_silu(values, _load(dy + place, there, FULL), slope, constant, FAST, SILU)
            _store(dx + place, du * slope[None, :] + values * of_x[None, :] + rest[None, :], there, FULL)


def _forward_tile(x: Tensor, groups: int) -> dict[str, Any]:
    """The constants of the forward kernel: the fastest of those tried on an H200 with 128 to 384 channels."""
    if x.shape[2] * x.shape[3] <= 256:
        return _tile(x, groups, columns=32, elements=2048, stages=1)
    even = (x.shape[1] // groups).bit_count() == 1
    return _tile(x, groups, columns=64, elements=8192 if even else 2048, stages=1 if even else 3)


def _backward_tile(x: Tensor, groups: int) -> dict[str, Any]:
    """The constants of the backward kernel, chosen like those of the forward kernel."""
    # Wide tiles are faster as long as there are enough of them for all multiprocessors.
    columns = 128 if x.shape[0] * x.shape[1] >= 2**15 else 64
    return _tile(x, groups, columns, elements=2048 if x.shape[2] * x.shape[3] <= 1024 else 8192, stages=3)


def _tile(x: Tensor, groups: int, columns: int, elements: int, stages: int) -> dict[str, Any]:
    """The constants of a kernel whose programs take as many whole groups as fit into a tile.

    Args:
        columns: channels of a tile.
        elements: elements of a tile. An image with more pixels is read in turns.
        stages: tiles in flight from memory.
    """
    _, channels, height, width = x.shape
    pixels, group, here = height * width, channels // groups, 1
    # A thread loads 16 bytes at once if a program's channels are a multiple of them.
    while groups % (here * 2) == 0 and (here * 2 * group <= columns or here * group * x.element_size() % 16):
        here *= 2
    columns = triton.next_power_of_2(here * group)
    rows = max(16, min(triton.next_power_of_2(pixels), elements // columns))
    return {
        "PIXELS": pixels,
        "GROUPS_HERE": here,
        "GROUP": group,
        "COLUMNS": columns,
        "ROWS": rows,
        "STAGES": stages,
        "FULL": here * group == columns and pixels % rows == 0,
        "FAST": x.element_size() == 2,
        "num_warps": max(1, min(16, rows * columns // (32 * ELEMENTS_OF_A_THREAD))),
    }


def _arguments(
    x: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[tuple[Tensor | int, ...], dict[str, bool]]:
    """A kernel's parameters and which of them exist. Those that don't are never read."""
    modulation = (weight, weight, 0) if scale is None or shift is None else (scale, shift, scale.stride(0))
    exist = {"BEFORE": before is not None, "MODULATED": scale is not None}
    return (weight if before is None else before, weight, bias, *modulation), exist


@torch.library.custom_op("ray_ddpm::group_norm", mutates_args=())
def _forward(
    x: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    groups: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tile, y = _forward_tile(x, groups), torch.empty_like(x)
    means, rstds = (torch.empty(x.shape[0], groups, device=x.device) for _ in range(2))
    parameters, exist = _arguments(x, before, weight, bias, scale, shift)
    _forward_kernel[(x.shape[0], groups // tile["GROUPS_HERE"])](
        x, y, *parameters, means, rstds, x.shape[1], eps, SILU=silu, **exist, **tile
    )
    return y, means, rstds


@torch.library.custom_op("ray_ddpm::group_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, means: Tensor, rstds: Tensor, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of x, and each image's gradients of weight, bias, and, if given, before, scale, shift: [K, N, C]."""
    groups, dx = means.shape[1], torch.empty_like(x)
    tile = _backward_tile(x, groups)
    parameters, exist = _arguments(x, before, weight, bias, scale, shift)
    of_parameters = torch.empty(_count(before, scale), *x.shape[:2], device=x.device)
    _backward_kernel[(x.shape[0], groups // tile["GROUPS_HERE"])](
        dy, x, dx, *parameters, means, rstds, of_parameters, x.shape[1], SILU=silu, **exist, **tile
    )
    return dx, of_parameters


def _count(before: Tensor | None, scale: Tensor | None) -> int:
    return 2 + (before is not None) + 2 * (scale is not None)


@_forward.register_fake
def _(x, before, weight, bias, scale, shift, groups, eps, silu):
    means = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    return torch.empty_like(x), means, torch.empty_like(means)


@_backward.register_fake
def _(dy, x, before, weight, bias, scale, shift, means, rstds, silu):
    return torch.empty_like(x), x.new_empty(_count(before, scale), *x.shape[:2], dtype=torch.float32)


def _keep(ctx, inputs, output) -> None:
    x, before, weight, bias, scale, shift, _, _, ctx.silu = inputs
    ctx.save_for_backward(x, before, weight, bias, scale, shift, *output[1:])


def _gradients(ctx, dy: Tensor, *_):
    x, before, weight, bias, scale, shift, means, rstds = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, of_images = _backward(dy, x, before, weight, bias, scale, shift, means, rstds, ctx.silu)
    last = 2 if before is None else 3
    of_parameters = of_images[:last].sum(1)
    of_scale, of_shift = (None, None) if scale is None else of_images[last:].to(scale.dtype).unbind()
    of_before = None if before is None else of_parameters[2].to(before.dtype)
    of_weight, of_bias = of_parameters[:2].to(weight.dtype).unbind()
    return dx, of_before, of_weight, of_bias, of_scale, of_shift, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    before: Tensor | None = None,
) -> Tensor:
    """silu((1 + scale) group_norm(x + before) + shift). Scale, shift, before and SiLU are optional.

    Args:
        x: [N, C, H, W], on a GPU, any float dtype.
        scale, shift: [N, C], contiguous in the last dimension and with equal strides; or None.
        before: [C], such as the bias of the convolution that made x; or None.

    Returns:
        [N, C, H, W] in the dtype of `x`, in channels_last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    y, _, _ = _forward(x, before, weight, bias, scale, shift, groups, eps, silu)
    result: Tensor = y
    return result
