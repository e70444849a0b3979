"""The UNet that predicts epsilon (Ho et al. 2020; Nichol & Dhariwal 2021).

Residual blocks with group norm and scale-shift time embedding, self-attention at chosen resolutions, strided
convolutions down and nearest-neighbour up. Structure and parameter names are those of diffusers'
UNet2DModel, so that an export to it is a copy (see models/diffusers.py).
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec
from pipeline.errors import InputError
from pipeline.models.attention import self_attention
from pipeline.models.conv import Conv2d
from pipeline.models.norm import GroupNorm
from pipeline.ranges import check_ranges

MOST_GROUPS, LEAST_GROUP = 32, 4
NORM_EPS = 1e-5
LONGEST_PERIOD = 10_000


def out_channels(image: ImageConfig, diffusion: DiffusionConfig) -> int:
    """Channels of the model's output: epsilon, and v beside it where the variance is learned."""
    return image.channels * (2 if diffusion.variance == "learned_range" else 1)


def build(spec: ModelSpec) -> "UNet":
    """An untrained model of a spec; its first output is exactly zero."""
    return UNet(spec.model, spec.image, out_channels(spec.image, spec.diffusion))


def norm_groups(config: ModelConfig) -> int:
    """Groups of every group norm: 32, or as many as divide the channels, of 4 channels at least.

    A group of one channel would lose that channel's mean: on MNIST, a network of 32 channels learns more slowly so.
    """
    channels = config.model_channels
    most = min(MOST_GROUPS, channels // LEAST_GROUP)
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def check_model(config: ModelConfig, image: ImageConfig) -> None:
    """Whether a model can be built for such images.

    Raises:
        InputError: names the setting and values that would do.
    """
    check_ranges(config)
    if config.model_channels % 2:
        near = f"{config.model_channels - 1} or {config.model_channels + 1}"
        raise InputError(f"--model-channels {config.model_channels} must be even: give {near}")
    if not config.channel_multipliers:
        raise InputError("--channel-multipliers needs at least one value")
    factor = 2 ** (len(config.channel_multipliers) - 1)
    if image.size % factor:
        below = image.size // factor * factor
        sizes = f"{below} or {below + factor}" if below else f"{factor}"
        raise InputError(
            f"image size {image.size} can't be halved {len(config.channel_multipliers) - 1} times: prepare the data "
            f"with --image-size {sizes}, or give fewer --channel-multipliers"
        )
    if config.class_conditional and not image.classes:
        raise InputError(
            "--class-conditional: the data has no labels: leave the flag out, or give labelled data"
        )
    widths = [
        config.model_channels * m
        for i, m in enumerate(config.channel_multipliers)
        if _attends(config, image, i)
    ]
    widths = sorted({*widths, config.model_channels * config.channel_multipliers[-1]})
    if any(width % config.head_channels for width in widths):
        common = math.gcd(*widths)
        fit = [size for size in range(1, min(common, 1024) + 1) if common % size == 0]
        nearest = sorted(sorted(fit, key=lambda size: abs(size - config.head_channels))[:3])
        raise InputError(
            f"--head-channels {config.head_channels} does not divide the {' and '.join(map(str, widths))} channels of "
            f"levels with attention: give {', '.join(map(str, nearest[:-1]))} or {nearest[-1]}"
        )


def _attends(config: ModelConfig, image: ImageConfig, level: int) -> bool:
    return image.size // 2**level in config.attention_resolutions


class UNet(nn.Module):
    """Predicts epsilon (and v) from x_t and t.

    Args:
        image: size and channels of the images, and the classes where the model is conditional on them; the
            label `len(classes)` stands for no label.
        out_channels: see the function of that name.

    Raises:
        InputError: see `check_model`.
    """

    def __init__(self, config: ModelConfig, image: ImageConfig, out_channels: int) -> None:
        super().__init__()
        check_model(config, image)
        self.config, self.null_label = config, len(image.classes)
        widths = [config.model_channels * m for m in config.channel_multipliers]
        embedding = 4 * config.model_channels
        self.conv_in = Conv2d(image.channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], embedding)
        self.class_embedding = (
            nn.Embedding(len(image.classes) + 1, embedding) if config.class_conditional else None
        )
        self.down_blocks = nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for level, out in enumerate(widths):
            ins = [width] + [out] * (config.res_blocks - 1)
            last = level == len(widths) - 1
            block = Level(
                config, ins, out, embedding, _attends(config, image, level), None if last else "down"
            )
            self.down_blocks.append(block)
            skips += [out] * (config.res_blocks + (not last))
            width = out
        self.mid_block = Level(config, [width, width], width, embedding, True, None, between=True)
        self.up_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            ins = [(width if i == 0 else out) + skips.pop() for i in range(config.res_blocks + 1)]
            block = Level(
                config, ins, out, embedding, _attends(config, image, level), "up" if level else None
            )
            self.up_blocks.append(block)
            width = out
        self.conv_norm_out = GroupNorm(norm_groups(config), width, NORM_EPS)
        self.conv_out = _zero(Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [N, C, H, W].
            t: timesteps of the process the model was trained with, counted from 0, [N].
            labels: int64 [N]; None means no label for all.

        Returns:
            float32 [N, out_channels, H, W].
        """
        embedding = self.time_embedding(t)
        if self.class_embedding is not None:
            labels = torch.full_like(t, self.null_label, dtype=torch.int64) if labels is None else labels
            embedding = embedding + self.class_embedding(labels)
        embedding = F.silu(embedding)
        h = self.conv_in(x)
        skips = [h]
        for block in cast(list[Level], self.down_blocks):
            for resnet, attention in block.layers():
                h = attention(resnet(h, embedding))
                skips.append(h)
            if block.downsamplers is not None:
                h = block.downsamplers[0](h)
                skips.append(h)
        (first, attention), (second, _) = self.mid_block.layers()
        h = second(attention(first(h, embedding)), embedding)
        for block in cast(list[Level], self.up_blocks):
            for resnet, attention in block.layers():
                h = attention(resnet(torch.cat([h, skips.pop()], dim=1), embedding))
            if block.upsamplers is not None:
                h = block.upsamplers[0](h)
        return self.conv_out(self.conv_norm_out(h, silu=True)).float()


class TimeEmbedding(nn.Module):
    """Sinusoids of t through two linear layers: [N] to [N, out]."""

    def __init__(self, frequencies: int, out: int) -> None:
        super().__init__()
        half = frequencies // 2
        rates = torch.exp(-math.log(LONGEST_PERIOD) * torch.arange(half, dtype=torch.float32) / half)
        self.rates: Tensor
        self.register_buffer("rates", rates, persistent=False)
        self.linear_1 = nn.Linear(frequencies, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.rates
        return self.linear_2(F.silu(self.linear_1(torch.cat([angles.cos(), angles.sin()], dim=1))))


class Level(nn.Module):
    """The blocks of one resolution. `between`: attention only between the blocks, as in the middle."""

    def __init__(
        self,
        config: ModelConfig,
        ins: list[int],
        out: int,
        embedding: int,
        attends: bool,
        resample: str | None,
        between: bool = False,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(config, i, out, embedding) for i in ins)
        count = len(ins) - between if attends else 0
        self.attentions = nn.ModuleList(Attention(config, out) for _ in range(count)) or None
        self.downsamplers = nn.ModuleList([Downsample(out)]) if resample == "down" else None
        self.upsamplers = nn.ModuleList([Upsample(out)]) if resample == "up" else None

    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        """(residual block, attention or nothing) pairs, in order."""
        attentions = [*(self.attentions or []), *[_PASS] * len(self.resnets)]
        return list(zip(self.resnets, attentions, strict=False))


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, then scale and shift by the embedding, norm, SiLU, dropout, conv; plus the input."""

    def __init__(self, config: ModelConfig, channels: int, out: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(norm_groups(config), channels, NORM_EPS)
        self.conv1 = Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, 2 * out)
        self.norm2 = GroupNorm(norm_groups(config), out, NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _zero(Conv2d(out, out, 3, padding=1))
        self.conv_shortcut = Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`embedding` has been through SiLU already: once for all blocks."""
        h = self.conv1(self.norm1(x, silu=True))
        scale, shift = self.time_emb_proj(embedding).chunk(2, dim=1)
        h = self.dropout(self.norm2(h, scale, shift, silu=True))
        return self.conv2(h, x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head self-attention over the pixels, with a residual connection."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.heads = channels // config.head_channels
        self.group_norm = GroupNorm(norm_groups(config), channels, NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([_zero(nn.Linear(channels, channels))])

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        bias = torch.cat([self.to_q.bias, self.to_k.bias, self.to_v.bias])
        h = self_attention(F.linear(h, weight, bias), self.heads)
        h = self.to_out[0](h).transpose(1, 2).reshape(n, channels, height, width)
        return x + h


class Downsample(nn.Module):
    """Halves the resolution with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        return result


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a 3x3 convolution, as one transposed convolution.

    Pixels of a doubled image come in equal pairs, so the taps that meet a pair add up beforehand: a 4x4 kernel
    with stride 2, which does 4 products for every 9 and never holds the doubled input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)
        self.taps: Tensor
        taps = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.einsum("oikl,ka,lb->ioab", self.conv.weight, self.taps, self.taps)
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


_PASS = nn.Identity()


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
