"""From an exported model to images: sample i is a function of (model, settings, seed, i)."""

import torch
from torch import Tensor

from pipeline.config import ModelSpec, SamplerName
from pipeline.diffusion.process import make_process
from pipeline.diffusion.samplers import sample
from pipeline.models.unet import UNet
from pipeline.rng import Purpose, normal


@torch.inference_mode()
def sample_images(
    model: UNet,
    spec: ModelSpec,
    ids: Tensor,
    *,
    sampler: SamplerName = "ancestral",
    sampling_steps: int = 0,
    eta: float = 0.0,
    guidance: float = 1.0,
    labels: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Draws the samples numbered `ids` of a seed, in one batch.

    Args:
        ids: int64 [N], on the model's device.
        sampling_steps: 0 = T.
        labels: class of each sample, int64 [N]; None = unconditional.

    Returns:
        uint8 [N, C, H, W].
    """
    image = spec.image
    shape = (image.channels, image.size, image.size)
    x_0 = sample(
        make_process(spec.diffusion),
        model,
        normal(seed, 0, ids, Purpose.SAMPLING, shape),
        lambda step: normal(seed, step + 1, ids, Purpose.SAMPLING, shape),
        sampler,
        sampling_steps or spec.diffusion.timesteps,
        eta=eta,
        labels=labels,
        guidance=guidance,
        null_label=len(image.classes),
    )
    return to_uint8(x_0)


def to_uint8(x_0: Tensor) -> Tensor:
    """[-1, 1] to 0..255, rounded."""
    return x_0.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
