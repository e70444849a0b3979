"""Group norm (Wu & He 2018), with the scale, shift and SiLU that follow it in a UNet, in few passes over memory.

On a GPU all of it is one kernel (`pipeline.gpu.norm`). In bf16 on a CPU, with channels_last images, the norm is
written here. torch's own kernel takes up to ten times as long as for contiguous images, most of it in the backward
pass: a fifth of a training step. The code here avoids that, because it sums over pixels for all channels at once, and
the channels of a pixel are adjacent in memory.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pipeline.gpu import available

# With this many pixels or more, torch's forward kernel is faster. It handles one group after the other.
MANY_PIXELS = 1024
CACHED_ELEMENTS = 2**19  # elements whose fp32 copy fits into the cache


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` with optional scale, shift and SiLU. Values agree with torch's up to the rounding of bf16."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__(groups, channels, eps)
        self._kernels = available.work()

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        silu: bool = False,
        before: Tensor | None = None,
    ) -> Tensor:
        """silu((1 + scale) norm(x + before) + shift).

        Args:
            x: [N, C, H, W].
            scale, shift: [N, C]; None = neither is applied.
            silu: apply SiLU.
            before: the bias that `Conv2d.without_bias` left out, [C].
        """
        if self._kernels and not x.is_cpu:
            from pipeline.gpu import norm

            return norm.group_norm(
                x, self.weight, self.bias, scale, shift, self.num_groups, self.eps, silu, before
            )
        h = self._norm(x if before is None else x + before[:, None, None])
        if scale is not None and shift is not None:
            h = torch.addcmul(shift[:, :, None, None], h, 1 + scale[:, :, None, None])
        return F.silu(h) if silu else h

    def _norm(self, x: Tensor) -> Tensor:
        own = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling()
        if own and x.is_contiguous(memory_format=torch.channels_last):
            result: Tensor = _ChannelsLast.apply(x, self.weight, self.bias, self.num_groups, self.eps)
            return result
        return super().forward(x)


class _ChannelsLast(torch.autograd.Function):
    """y = a x + d, with a and d for each image and channel; sums are in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, channels, height, width = x.shape
        if height * width < MANY_PIXELS:
            values = _rows(x).float()
            total, squares = (_groups(part.sum(1), groups) for part in (values, values * values))
            count = height * width * channels // groups
            mean = total / count
            rstd = (squares / count - mean * mean).clamp_min(0).add(eps).rsqrt()
            a = _channels(rstd, channels) * weight
            d = bias - _channels(mean, channels) * a
            y = _images(torch.addcmul(d[:, None], values, a[:, None]).to(x.dtype), x)
        else:
            y, mean, rstd = torch.native_group_norm(
                x, weight.to(x.dtype), bias.to(x.dtype), n, channels, height * width, groups, eps
            )
        ctx.save_for_backward(x, weight, mean.float(), rstd.float())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        channels, groups = x.shape[1], mean.shape[1]
        rows, gradient = _rows(x), _rows(dy)
        count = rows.shape[1] * channels // groups
        # A few images at a time, because an fp32 sum copies its input, and copies that leave the cache are slow.
        step = max(1, CACHED_ELEMENTS // rows[0].numel())
        pieces = [
            (d.sum(1, dtype=torch.float32), (d * r).sum(1, dtype=torch.float32))
            for d, r in zip(gradient.split(step), rows.split(step), strict=True)
        ]
        sum_dy, sum_dy_x = (torch.cat(sums) for sums in zip(*pieces, strict=True))
        of_bias = sum_dy.sum(0)
        of_weight = ((sum_dy_x - _channels(mean, channels) * sum_dy) * _channels(rstd, channels)).sum(0)
        # dx = dy w rstd + p x + q: the paths through y itself, the variance and the mean.
        by_y, by_y_x = _groups(sum_dy * weight, groups), _groups(sum_dy_x * weight, groups)
        p = (by_y * mean - by_y_x) * rstd**3 / count
        q = -p * mean - by_y * rstd / count
        factors = _channels(q, channels), _channels(p, channels), _channels(rstd, channels) * weight
        constant, of_x, of_dy = (factor[:, None].to(x.dtype) for factor in factors)
        dx = torch.addcmul(constant, rows, of_x).addcmul_(gradient, of_dy)
        return _images(dx, x), of_weight, of_bias, None, None


def _rows(images: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H W, C]; a view if the images are channels_last."""
    return images.permute(0, 2, 3, 1).flatten(1, 2)


def _images(rows: Tensor, like: Tensor) -> Tensor:
    n, channels, height, width = like.shape
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2)


def _groups(values: Tensor, groups: int) -> Tensor:
    """Sums over the channels of each group: [N, C] to [N, G]."""
    return values.unflatten(1, (groups, -1)).sum(2)


def _channels(values: Tensor, channels: int) -> Tensor:
    """Repeats each group's value for its channels: [N, G] to [N, C]."""
    return values.repeat_interleave(channels // values.shape[1], 1)
