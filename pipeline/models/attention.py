"""Scaled dot-product attention (Vaswani et al. 2017), with a backward pass of our own in bf16 on a CPU.

torch's CPU kernel for the backward pass takes a sixth of a training step. Matrix products take half as long, or a
quarter for small images, because oneDNN multiplies bf16 faster than the kernel does.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MOST_TOKENS = 1024  # with 4,096 tokens torch's kernel is faster
# Elements of a tile of [tokens, tokens] matrices in the backward pass. Two such tiles in bf16 fit into the cache.
TILE_ELEMENTS = 2**21


def self_attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for every head.

    Args:
        qkv: [N, T, 3 H D]: the queries of all heads, then their keys, then their values.
        heads: number of heads, H.

    Returns:
        [N, T, H D].
    """
    own = qkv.dtype == torch.bfloat16 and qkv.is_cpu and not torch.compiler.is_compiling()
    if own and qkv.shape[1] <= MOST_TOKENS and torch.is_grad_enabled():
        result: Tensor = _Attention.apply(qkv, heads)
        return result
    q, k, v = _parts(qkv, heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_parts(qkv, heads))
        out = out.transpose(1, 2).flatten(2)
        ctx.save_for_backward(qkv, out, logsumexp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        """Dao et al. 2022, appendix B. With S = q k^T / sqrt(D), P = softmax(S) and delta = rowsum(d_out * out):

        dv = P^T d_out, dS = P * (d_out v^T - delta), dq = dS k / sqrt(D), dk = dS^T q / sqrt(D).
        """
        qkv, out, logsumexp = ctx.saved_tensors
        n, tokens, _ = qkv.shape
        heads = logsumexp.shape[1]
        q, k, v = (part.flatten(0, 1) for part in _parts(qkv, heads))
        scale = q.shape[2] ** -0.5
        d_out, out = (x.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1) for x in (d_out, out))
        delta = (d_out * out).sum(2, keepdim=True, dtype=torch.float32)
        # Products are rounded to bf16. Two more columns subtract the logsumexp and delta inside the product, before
        # the rounding. P is scaled by sqrt(tokens), which makes its exponents and so its rounding errors smaller.
        middle = math.log(tokens) / 2
        ones = q.new_ones(*q.shape[:2], 2)
        q_and, k_and = (
            torch.cat([q, *_two((middle - logsumexp.flatten(0, 1)[..., None]) / scale)], 2),
            torch.cat([k, ones], 2),
        )
        d_and, v_and = torch.cat([d_out, *_two(-delta)], 2), torch.cat([v, ones], 2)
        result = q.new_empty(3, *q.shape)
        factor, none = math.exp(-middle), q.new_empty(1)

        def product(a: Tensor, b: Tensor, alpha: float, out: Tensor) -> None:
            torch.baddbmm(none, a, b, beta=0, alpha=alpha, out=out)

        step = max(1, TILE_ELEMENTS // tokens**2)
        for first in range(0, len(q), step):
            part = slice(first, first + step)
            p = torch.baddbmm(none, q_and[part], k_and[part].mT, beta=0, alpha=scale).exp_()
            ds = torch.bmm(d_and[part], v_and[part].mT).mul_(p)
            product(ds, k[part], factor * scale, result[0, part])
            product(ds.mT, q[part], factor * scale, result[1, part])
            product(p.mT, d_out[part], factor, result[2, part])
        return result.view(3, n, heads, tokens, -1).permute(1, 3, 0, 2, 4).flatten(2), None


def _parts(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the queries, keys and values: [N, H, T, D] each."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def _two(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 numbers as a sum of two bf16 numbers: the rounded number and its rounding error."""
    first = values.bfloat16()
    return first, (values - first.float()).bfloat16()
