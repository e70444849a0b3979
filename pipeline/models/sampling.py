"""Samples images from an exported model. Sample i is a function of (model, settings, seed, i)."""

from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from pipeline.config import ModelSpec, SamplerName
from pipeline.diffusion.losses import Model
from pipeline.diffusion.process import make_process
from pipeline.diffusion.samplers import sample
from pipeline.rng import Purpose, normal

SERVED: dict[str, Any] = {
    "sampler": "ddim",
    "sampling_steps": 50,
    "eta": 1.0,
    "guidance": 1.0,
    "least_alpha_bar": 0.0,
    "seed": 0,
}
"""Default sampling parameters of a model served by MLflow; see `tracking/pyfunc.py`."""


class SamplerSettings(TypedDict, total=False):
    """Settings of the sampler. A missing key has the default of the job's flag.

    Keys:
        sampler: "ancestral", "ddim" or "dpm_solver".
        sampling_steps: number of steps; 0 = T.
        eta: noise of DDIM, 0 to 1.
        guidance: scale of classifier-free guidance; 1 = none.
        labels: class of each sample, int64 [N]; None = unconditional.
        seed: any integer.
        least_alpha_bar: least alpha_bar of the first step; see `samplers.sample`.
    """

    sampler: SamplerName
    sampling_steps: int
    eta: float
    guidance: float
    labels: Tensor | None
    seed: int
    least_alpha_bar: float


def sample_images(model: Model, spec: ModelSpec, ids: Tensor, **settings: Unpack[SamplerSettings]) -> Tensor:
    """Draws the samples with numbers `ids` (int64 [N], on the model's device) of a seed, in one batch.

    Returns:
        uint8 [N, C, H, W].
    """
    return to_pixels(sample_floats(model, spec, ids, **settings))


class PreviewSettings(TypedDict, total=False):
    """The samples that a preview shows.

    Keys:
        first: number of the first sample; default 0.
        steps: model evaluations for each sample, at most T; default 25.
        seed: any integer; default 0.
        classes: sample i has class i modulo this number; 0 = the number of the model's classes (default).
    """

    first: int
    steps: int
    seed: int
    classes: int


def preview(model: nn.Module, spec: ModelSpec, count: int, **settings: Unpack[PreviewSettings]) -> Tensor:
    """As `preview_floats`, as uint8 [N, C, H, W]."""
    return to_pixels(preview_floats(model, spec, count, **settings))


def preview_floats(
    model: nn.Module, spec: ModelSpec, count: int, **settings: Unpack[PreviewSettings]
) -> Tensor:
    """Draws `count` samples with DDIM, which is fast and good enough to look at.

    DDIM uses its full noise here (eta 1). Without noise, the first steps of a cosine schedule saturate the images of
    a briefly trained model, so the preview would look worse than the model is.

    Returns:
        as `sample_floats`, on the model's device.
    """
    first, classes = settings.get("first", 0), settings.get("classes", 0)
    ids = torch.arange(first, first + count, device=next(model.parameters()).device)
    return sample_floats(
        model,
        spec,
        ids,
        sampler="ddim",
        eta=1.0,
        sampling_steps=min(settings.get("steps", 25), spec.diffusion.timesteps),
        labels=ids % (classes or len(spec.image.classes)) if spec.model.class_conditional else None,
        seed=settings.get("seed", 0),
    )


@torch.inference_mode()
def sample_floats(model: Model, spec: ModelSpec, ids: Tensor, **settings: Unpack[SamplerSettings]) -> Tensor:
    """As `sample_images`, but x_0 as the sampler returns it: float32 [N, C, H, W], in [-1, 1] and slightly beyond."""
    image, seed = spec.image, settings.get("seed", 0)
    shape, process = (image.channels, image.size, image.size), make_process(spec.diffusion)
    least = settings.get("least_alpha_bar", 0.0)
    return sample(
        process,
        model,
        normal(seed, 0, ids, Purpose.SAMPLING, shape),
        lambda step: normal(seed, step + 1, ids, Purpose.SAMPLING, shape),
        settings.get("sampler", "ancestral"),
        settings.get("sampling_steps", 0) or int((process.alpha_bar >= least).sum()),
        eta=settings.get("eta", 0.0),
        labels=settings.get("labels"),
        guidance=settings.get("guidance", 1.0),
        null_label=len(image.classes) if spec.model.class_conditional else None,
        least_alpha_bar=least,
    )


def from_pixels(images: Tensor) -> Tensor:
    """Converts uint8 0..255 to float32 in [-1, 1]."""
    return images.to(torch.float32, copy=True).div_(127.5).sub_(1.0)


def to_pixels(x_0: Tensor) -> Tensor:
    """Converts [-1, 1] to uint8 0..255 with rounding and clamping. NaN becomes 128."""
    return x_0.nan_to_num(0.0).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
