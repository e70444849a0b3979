"""From an exported model to images: sample i is a function of (model, settings, seed, i)."""

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
"""What a served model samples with, unless it is told otherwise: the parameters of `tracking/pyfunc.py`."""


class SamplerSettings(TypedDict, total=False):
    """How samples are drawn; what is left out has the default of the job's flag.

    Keys:
        sampler: "ancestral", "ddim" or "dpm_solver".
        sampling_steps: 0 = T.
        eta: noise of DDIM.
        guidance: 1 = none.
        labels: class of each sample, int64 [N]; None = unconditional.
        seed: any integer.
        least_alpha_bar: of the first step; see `samplers.sample`.
    """

    sampler: SamplerName
    sampling_steps: int
    eta: float
    guidance: float
    labels: Tensor | None
    seed: int
    least_alpha_bar: float


def sample_images(model: Model, spec: ModelSpec, ids: Tensor, **settings: Unpack[SamplerSettings]) -> Tensor:
    """Draws the samples numbered `ids` (int64 [N], on the model's device) of a seed, in one batch.

    Returns:
        uint8 [N, C, H, W].
    """
    return to_pixels(sample_floats(model, spec, ids, **settings))


class PreviewSettings(TypedDict, total=False):
    """Which samples a preview shows.

    Keys:
        first: number of the first one; 0 if left out.
        steps: model evaluations a sample; T where that is fewer; 25 if left out.
        seed: any integer; 0 if left out.
        classes: the class of sample i is i modulo this number; 0 = all of a class-conditional model's.
    """

    first: int
    steps: int
    seed: int
    classes: int


def preview(model: nn.Module, spec: ModelSpec, count: int, **settings: Unpack[PreviewSettings]) -> Tensor:
    """As `preview_floats`, but uint8 [N, C, H, W]."""
    return to_pixels(preview_floats(model, spec, count, **settings))


def preview_floats(
    model: nn.Module, spec: ModelSpec, count: int, **settings: Unpack[PreviewSettings]
) -> Tensor:
    """Draws `count` samples with DDIM: quick, and good enough to look at.

    DDIM uses its full noise here (eta 1). Without noise, the first steps of a cosine schedule saturate the images of a
    model that has trained briefly, and the model would be blamed.

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
    """As `sample_images`, but x_0 as the sampler leaves it: float32, in [-1, 1] and a little beyond."""
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
        null_label=len(image.classes),
        least_alpha_bar=least,
    )


def from_pixels(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1]."""
    return images.to(torch.float32, copy=True).div_(127.5).sub_(1.0)


def to_pixels(x_0: Tensor) -> Tensor:
    """[-1, 1] to uint8 0..255, rounded; what is not a number becomes the middle."""
    return x_0.nan_to_num(0.0).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
