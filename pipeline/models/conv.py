"""Convolutions that add their bias and a residual in one pass on a GPU."""

import torch
from torch import Tensor, nn

from pipeline.gpu import available


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, with an optional residual added to the result."""

    def __init__(self, channels: int, out: int, size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(channels, out, size, stride=stride, padding=padding)
        self._kernels = available.work()

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Convolves x, and leaves it to the group norm that follows to add the bias, if its kernel can.

        Returns:
            the result, [N, C, H, W], and the bias that is missing in it; None if it is complete.
        """
        if self._kernels and not x.is_cpu:
            return self._conv_forward(x, self.weight, None), self.bias
        return self(x), None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolves x [N, C, H, W]; `residual` has the result's shape."""
        # torch.compile fuses these operations itself.
        if self._kernels and not x.is_cpu and not torch.compiler.is_compiling() and self.bias is not None:
            from pipeline.gpu import bias

            return bias.add_bias(self._conv_forward(x, self.weight, None), self.bias, residual)
        h = super().forward(x)
        return h if residual is None else residual + h
