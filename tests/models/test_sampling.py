"""Conversion between pixels and floats, and a model's preview."""

from dataclasses import replace

import pytest
import torch

from pipeline.config import DiffusionConfig, ImageConfig, ModelSpec
from pipeline.errors import InputError
from pipeline.models.sampling import from_pixels, preview, sample_images, to_pixels
from tests.models.test_unet import SMALL, randomised

SPEC = ModelSpec(
    replace(SMALL, class_conditional=True), ImageConfig(8, 1, tuple("abc")), DiffusionConfig(timesteps=10)
)


def test_pixels_come_back_and_are_the_same_bits_as_by_the_formula() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    before = pixels.clone()
    numbers = from_pixels(pixels)
    assert torch.equal(numbers, pixels.float() / 127.5 - 1)
    assert (numbers.dtype, numbers.min(), numbers.max()) == (torch.float32, -1, 1)
    assert torch.equal(to_pixels(numbers), before)
    floats = pixels.float()
    assert torch.equal(from_pixels(floats), numbers)
    assert torch.equal(pixels, before) and torch.equal(floats, before.float())
    assert to_pixels(torch.tensor([float("nan"), 7.0, -7.0])).tolist() == [128, 255, 0]


def test_a_preview_is_the_same_samples_in_any_pieces_with_the_classes_in_turn() -> None:
    model = randomised(SPEC)
    images = preview(model, SPEC, 5, steps=4, seed=3)
    ids = torch.arange(5)
    asked = {"sampler": "ddim", "eta": 1.0, "sampling_steps": 4, "seed": 3}
    assert torch.equal(images, sample_images(model, SPEC, ids, labels=ids % 3, **asked))  # type: ignore[arg-type]
    assert torch.equal(images[2:], preview(model, SPEC, 3, first=2, steps=4, seed=3))
    two = preview(model, SPEC, 5, steps=4, seed=3, classes=2)
    assert torch.equal(two, sample_images(model, SPEC, ids, labels=ids % 2, **asked))  # type: ignore[arg-type]
    # The preview takes at most T steps.
    assert torch.equal(preview(model, SPEC, 2, steps=25), preview(model, SPEC, 2, steps=10))


def test_guidance_of_a_model_without_classes_is_refused_and_not_left_out_silently() -> None:
    spec = replace(SPEC, model=SMALL)
    labels = torch.tensor([0, 1])
    with pytest.raises(InputError, match="guidance: needs labels and a class-conditional model"):
        sample_images(randomised(spec), spec, torch.arange(2), labels=labels, guidance=2.0)
    assert sample_images(randomised(spec), spec, torch.arange(2), labels=labels).shape == (2, 1, 8, 8)
