"""The UNet that predicts epsilon (Ho et al. 2020; Nichol & Dhariwal 2021).

It has residual blocks with group norm and scale-shift time embedding, self-attention at chosen resolutions, strided
convolutions downwards and nearest-neighbour upsampling. Its structure and parameter names are those of diffusers'
UNet2DModel, so an export to diffusers is a copy (see models/diffusers.py), unless the input has Fourier features.
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
    """Channels of the model's output: epsilon, followed by v if the variance is learned."""
    return image.channels * (2 if diffusion.variance == "learned_range" else 1)


def build(spec: ModelSpec) -> "UNet":
    """An untrained model of a specification. Its output is exactly zero."""
    return UNet(spec.model, spec.image, out_channels(spec.image, spec.diffusion))


def norm_groups(config: ModelConfig) -> int:
    """Number of groups in every group norm: at most 32, a divisor of the channels, with at least 4 channels a group.

    A group of one channel would lose that channel's mean. On MNIST, a network of 32 channels learns more slowly that
    way.
    """
    channels = config.model_channels
    most = min(MOST_GROUPS, channels // LEAST_GROUP)
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def check_model(config: ModelConfig, image: ImageConfig) -> None:
    """Checks that a model can be built for such images.

    Raises:
        InputError: it can't; the message names the setting and values that fit.
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
        config: settings of the network.
        image: size and channels of the images, and their classes if the model is class-conditional. The label
            `len(classes)` stands for "no label".
        out_channels: see the function of that name.

    Raises:
        InputError: as `check_model`.
    """

    def __init__(self, config: ModelConfig, image: ImageConfig, out_channels: int) -> None:
        super().__init__()
        check_model(config, image)
        self.config, self.null_label = config, len(image.classes)
        widths = [config.model_channels * m for m in config.channel_multipliers]
        embedding = 4 * config.model_channels
        inputs = image.channels * (1 + 2 * len(config.fourier_features))
        self.conv_in = Conv2d(inputs, widths[0], 3, padding=1)
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
        """Predicts epsilon, and v if the variance is learned.

        Args:
            x: x_t, [N, C, H, W].
            t: timesteps of the process that the model was trained with, from 0: [N].
            labels: int64 [N]; None = no label for all images.

        Returns:
            float32 [N, out_channels, H, W].
        """
        embedding = self.time_embedding(t)
        if self.class_embedding is not None:
            labels = torch.full_like(t, self.null_label, dtype=torch.int64) if labels is None else labels
            embedding = embedding + self.class_embedding(labels)
        embedding = F.silu(embedding)
        h = self.conv_in(_with_fourier_features(x, self.config.fourier_features))
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
    """Sinusoidal embedding of t (Vaswani et al. 2017), followed by two linear layers: [N] to [N, out]."""

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
    """The blocks of one resolution. With `between`, attention stands only between the blocks, as in the middle level."""

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
        """Pairs of a residual block and its attention (or the identity), in order."""
        attentions = [*(self.attentions or []), *[_PASS] * len(self.resnets)]
        return list(zip(self.resnets, attentions, strict=False))


class ResidualBlock(nn.Module):
    """Norm, SiLU, conv; then norm, scale and shift by the embedding, SiLU, dropout, conv; then the input is added."""

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
        """`embedding` has already passed SiLU, once for all blocks."""
        h, bias = self.conv1.without_bias(self.norm1(x, silu=True))
        scale, shift = self.time_emb_proj(embedding).chunk(2, dim=1)
        h = self.dropout(self.norm2(h, scale, shift, silu=True, before=bias))
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
    """Doubles the resolution: nearest neighbour, then a 3x3 convolution, computed as one transposed convolution.

    Nearest-neighbour upsampling makes pairs of equal pixels, so the kernel's taps on a pair can be added beforehand.
    This gives a 4x4 kernel with stride 2, which needs 4 products in place of 9 and never stores the doubled input.
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


def _with_fourier_features(x: Tensor, powers: tuple[int, ...]) -> Tensor:
    """Appends sin(2^n pi x) and cos(2^n pi x) for each power n, which tell close values apart (Kingma et al. 2021).

    [N, C, H, W] to [N, C (1 + 2 len(powers)), H, W].
    """
    if not powers:
        return x
    angles = [2**n * math.pi * x.float() for n in powers]
    parts = [x, *(part.to(x.dtype) for angle in angles for part in (angle.sin(), angle.cos()))]
    return torch.cat(parts, dim=1)


_PASS = nn.Identity()


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
