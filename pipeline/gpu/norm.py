"""Group norm, scale and shift, and SiLU as one Triton kernel each for forward and backward, on channels_last images.

torch's CUDA kernel needs contiguous images, so it copies every image to that layout and back. SiLU and modulation
read and write the images once more each. Together this took more than half of a step's time on a GPU.

A program handles some groups of one image. It reads them twice, the second time from the cache, and writes them once.
Sums are in float32 for every dtype of the images.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 64  # channels of one program: 128 bytes of a pixel in bf16, one cache line
# Elements of a program's tile, elements of each thread, and tiles in flight from memory: the fastest of those tried
# on an H200 with 128 to 512 channels at 4x4 to 64x64 pixels.
FORWARD, BACKWARD = (8192, 16, 1), (2048, 8, 3)


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
    weight, bias, scale, shift, stride,
    channel, exists, MODULATED: tl.constexpr,
):  # fmt: skip
    """Weight and bias of each column, and (1 + scale) and shift of this image."""
    w = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    factor, offset = tl.full(w.shape, 1.0, tl.float32), tl.zeros_like(w)
    if MODULATED:
        row = tl.program_id(0).to(tl.int64) * stride
        factor += tl.load(scale + row + channel, mask=exists, other=0.0).to(tl.float32)
        offset += tl.load(shift + row + channel, mask=exists, other=0.0).to(tl.float32)
    return w, b, factor, offset


@triton.jit
def _forward_kernel(
    x, y, weight, bias, scale, shift,
    stride, means, rstds, channels, eps,
    PIXELS: tl.constexpr, GROUPS_HERE: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    channel, exists, belongs = _columns(GROUPS_HERE, GROUP, COLUMNS)
    start = tl.program_id(0).to(tl.int64) * PIXELS * channels
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, PIXELS, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        there = (row < PIXELS) & exists[None, :]
        values = tl.load(x + start + row * channels + channel[None, :], mask=there, other=0.0).to(tl.float32)
        total += values
        squares += values * values
    count = PIXELS * GROUP
    mean = _group_sums(tl.sum(total, axis=0), belongs) / count
    variance = _group_sums(tl.sum(squares, axis=0), belongs) / count - mean * mean
    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    here = _groups_here(GROUPS_HERE)
    tl.store(means + here, mean)
    tl.store(rstds + here, rstd)
    w, b, factor, offset = _factors(weight, bias, scale, shift, stride, channel, exists, MODULATED)
    slope = _of_groups(rstd, belongs) * w
    constant = (b - _of_groups(mean, belongs) * slope) * factor + offset
    slope = slope * factor
    for first in tl.range(0, PIXELS, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        there = (row < PIXELS) & exists[None, :]
        place = start + row * channels + channel[None, :]
        result = tl.load(x + place, mask=there, other=0.0).to(tl.float32) * slope[None, :] + constant[None, :]
        if SILU:
            result = result * tl.sigmoid(result)
        tl.store(y + place, result.to(y.dtype.element_ty), mask=there)


@triton.jit
def _before_silu(x, dy, there, slope, constant, SILU: tl.constexpr):
    """A tile of the images, and the gradient of u, the input of SiLU."""
    values = tl.load(x, mask=there, other=0.0).to(tl.float32)
    du = tl.load(dy, mask=there, other=0.0).to(tl.float32)
    if SILU:
        u = values * slope[None, :] + constant[None, :]
        s = tl.sigmoid(u)
        du = du * s * (1.0 + u * (1.0 - s))
    return values, du


@triton.jit
def _backward_kernel(
    dy, x, dx, weight, bias, scale,
    shift, stride, means, rstds, of_parameters,
    channels,
    PIXELS: tl.constexpr, GROUPS_HERE: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    channel, exists, belongs = _columns(GROUPS_HERE, GROUP, COLUMNS)
    start = tl.program_id(0).to(tl.int64) * PIXELS * channels
    here = _groups_here(GROUPS_HERE)
    mean = _of_groups(tl.load(means + here), belongs)
    rstd = _of_groups(tl.load(rstds + here), belongs)
    w, b, factor, offset = _factors(weight, bias, scale, shift, stride, channel, exists, MODULATED)
    slope = rstd * w * factor
    constant = (b - mean * rstd * w) * factor + offset
    # Sums of du and of du x over the pixels.
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    total_x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, PIXELS, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        there = (row < PIXELS) & exists[None, :]
        place = start + row * channels + channel[None, :]
        values, du = _before_silu(x + place, dy + place, there, slope, constant, SILU)
        total += du
        total_x += du * values
    sum_du, sum_du_x = tl.sum(total, axis=0), tl.sum(total_x, axis=0)
    sum_du_n = (sum_du_x - mean * sum_du) * rstd  # n: the normalised image
    # Gradients of weight, bias, scale and shift for this image: [4, N, C].
    size = tl.num_programs(0).to(tl.int64) * channels
    parameters = of_parameters + tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(parameters, sum_du_n * factor, mask=exists)
    tl.store(parameters + size, sum_du * factor, mask=exists)
    if MODULATED:
        tl.store(parameters + 2 * size, sum_du_n * w + sum_du * b, mask=exists)
        tl.store(parameters + 3 * size, sum_du, mask=exists)
    # dx = slope du - rstd (mean(dn) + n mean(dn n)), with dn = du factor w.
    count = PIXELS * GROUP
    of_mean = _of_groups(_group_sums(sum_du * factor * w, belongs), belongs) / count
    of_n = _of_groups(_group_sums(sum_du_n * factor * w, belongs), belongs) / count
    of_x = -rstd * rstd * of_n
    rest = -rstd * of_mean - mean * of_x
    for first in tl.range(0, PIXELS, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        there = (row < PIXELS) & exists[None, :]
        place = start + row * channels + channel[None, :]
        values, du = _before_silu(x + place, dy + place, there, slope, constant, SILU)
        result = du * slope[None, :] + values * of_x[None, :] + rest[None, :]
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=there)


def _tile(x: Tensor, groups: int, elements: int, each: int, stages: int) -> dict[str, int]:
    """The constants of a kernel. A program takes as many whole groups as fit into `CHANNELS`."""
    _, channels, height, width = x.shape
    group, here = channels // groups, 1
    while here * 2 * group <= CHANNELS and groups % (here * 2) == 0:
        here *= 2
    columns = triton.next_power_of_2(here * group)
    rows = max(16, min(triton.next_power_of_2(height * width), elements // columns))
    tile = {"PIXELS": height * width, "GROUPS_HERE": here, "GROUP": group, "COLUMNS": columns, "ROWS": rows}
    return tile | {"STAGES": stages, "num_warps": max(1, min(16, rows * columns // (32 * each)))}


@torch.library.custom_op("ray_ddpm::group_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tile, y = _tile(x, groups, *FORWARD), torch.empty_like(x)
    means, rstds = (torch.empty(x.shape[0], groups, device=x.device) for _ in range(2))
    modulation = (weight, weight, 0) if scale is None or shift is None else (scale, shift, scale.stride(0))
    _forward_kernel[(x.shape[0], groups // tile["GROUPS_HERE"])](
        x,
        y,
        weight,
        bias,
        *modulation,
        means,
        rstds,
        x.shape[1],
        eps,
        MODULATED=scale is not None,
        SILU=silu,
        **tile,
    )
    return y, means, rstds


@torch.library.custom_op("ray_ddpm::group_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, means: Tensor,
    rstds: Tensor, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of x, and for each image the gradients of weight, bias, scale and shift: [2 or 4, N, C]."""
    groups, dx = means.shape[1], torch.empty_like(x)
    tile = _tile(x, groups, *BACKWARD)
    modulation = (weight, weight, 0) if scale is None or shift is None else (scale, shift, scale.stride(0))
    parameters = torch.empty(2 if scale is None else 4, *x.shape[:2], device=x.device)
    _backward_kernel[(x.shape[0], groups // tile["GROUPS_HERE"])](
        dy, x, dx, weight, bias, *modulation, means, rstds, parameters, x.shape[1], MODULATED=scale is not None,
        SILU=silu, **tile,
    )  # fmt: skip
    return dx, parameters


@_forward.register_fake
def _(x, weight, bias, scale, shift, groups, eps, silu):
    means = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    return torch.empty_like(x), means, torch.empty_like(means)


@_backward.register_fake
def _(dy, x, weight, bias, scale, shift, means, rstds, silu):
    return torch.empty_like(x), x.new_empty(2 if scale is None else 4, *x.shape[:2], dtype=torch.float32)


def _keep(ctx, inputs, output) -> None:
    x, weight, bias, scale, shift, _, _, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift, *output[1:])


def _gradients(ctx, dy: Tensor, *_):
    x, weight, bias, scale, shift, means, rstds = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, parameters = _backward(dy, x, weight, bias, scale, shift, means, rstds, ctx.silu)
    of_weight, of_bias = parameters[:2].sum(1).to(weight.dtype).unbind()
    of_scale, of_shift = (None, None) if scale is None else parameters[2:].to(scale.dtype).unbind()
    return dx, of_weight, of_bias, of_scale, of_shift, None, None, None


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
) -> Tensor:
    """silu((1 + scale) group_norm(x) + shift). Scale, shift and SiLU are optional.

    Args:
        x: [N, C, H, W], on a GPU, any float dtype.
        scale, shift: [N, C], contiguous in the last dimension and with equal strides; or None.

    Returns:
        [N, C, H, W] in the dtype of `x`, in channels_last.
    """
    y, _, _ = _forward(
        x.contiguous(memory_format=torch.channels_last), weight, bias, scale, shift, groups, eps, silu
    )
    result: Tensor = y
    return result
