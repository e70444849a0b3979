"""The UNet has diffusers' structure, gives zero before training, and reports bad settings clearly."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec
from pipeline.diffusion.process import make_process
from pipeline.diffusion.samplers import sample
from pipeline.errors import InputError
from pipeline.models.diffusers import export_diffusers, unet_config
from pipeline.models.unet import UNet, Upsample, build, check_model

PLAIN = ModelSpec(ModelConfig(), ImageConfig(32, 3), DiffusionConfig())
SMALL = ModelConfig(model_channels=32, channel_multipliers=(1, 2), res_blocks=1, attention_resolutions=(4,))


def randomised(spec: ModelSpec) -> UNet:
    """Return a model with random weights and none at zero."""
    torch.manual_seed(0)
    model = build(spec).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_it_has_the_size_of_improved_diffusions_unet_of_that_shape() -> None:
    ours = sum(p.numel() for p in build(PLAIN).parameters())
    theirs = sum(p.numel() for p in UNet2DModel.from_config(unet_config(PLAIN)).parameters())
    assert ours == theirs
    assert 6.8e6 < ours < 7.0e6


@pytest.mark.parametrize("classes", [(), ("a", "b", "c")])
def test_the_first_output_is_zero(classes: tuple[str, ...]) -> None:
    image = ImageConfig(8, 1, classes)
    model = build(ModelSpec(SMALL, image, DiffusionConfig()))
    assert torch.equal(model(torch.randn(2, 1, 8, 8), torch.tensor([0, 5])), torch.zeros(2, 1, 8, 8))


def test_fourier_features_are_further_channels_of_the_input() -> None:
    image = ImageConfig(8, 2)
    plain, with_features = (
        randomised(ModelSpec(dataclasses.replace(SMALL, fourier_features=powers), image, DiffusionConfig()))
        for powers in ((), (0, 6))
    )
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([0, 5])
    weights = with_features.state_dict()
    seen = torch.nn.functional.conv2d(x, weights["conv_in.weight"][:, :2], padding=1)
    first = 2
    for n in (0, 6):
        for function in (torch.sin, torch.cos):
            part = weights["conv_in.weight"][:, first : first + 2]
            seen += torch.nn.functional.conv2d(function(2**n * math.pi * x), part, padding=1)
            first += 2
    assert first == weights["conv_in.weight"].shape[1] == 10
    # The rest of the network is the same: it sees the sum of both convolutions.
    plain.load_state_dict(weights | {"conv_in.weight": weights["conv_in.weight"][:, :2]})
    difference = seen - torch.nn.functional.conv2d(x, weights["conv_in.weight"][:, :2], padding=1)
    plain.conv_in.register_forward_hook(lambda layer, inputs, result: result + difference)
    assert torch.allclose(plain(x, t), with_features(x, t), rtol=1e-3, atol=1e-4)


def test_diffusers_has_no_fourier_features(tmp_path: Path) -> None:
    spec = ModelSpec(dataclasses.replace(SMALL, fourier_features=(3,)), ImageConfig(8, 1), DiffusionConfig())
    with pytest.raises(InputError, match="Fourier features"):
        export_diffusers(build(spec), spec, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (12, 4), (10, 3)])
def test_any_channel_count_and_any_size_its_downsampling_divides(size: int, channels: int) -> None:
    model = randomised(
        ModelSpec(SMALL, ImageConfig(size, channels), DiffusionConfig(variance="learned_range"))
    )
    assert model(torch.randn(2, channels, size, size), torch.tensor([0, 5])).shape == (
        2,
        2 * channels,
        size,
        size,
    )


def test_a_size_it_can_not_take_names_the_nearest() -> None:
    with pytest.raises(InputError, match="28 or 32"):
        check_model(ModelConfig(), ImageConfig(30, 3))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_channels": 41}, "41 must be even"),
        ({"class_conditional": True}, "no labels"),
        ({"head_channels": 24}, "24"),
    ],
)
def test_settings_that_can_not_be_built_say_why(changes: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        check_model(ModelConfig(**changes), ImageConfig(32, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("channels", "groups", "classes"),
    [(6, 1, ()), (32, 8, ("a", "b", "c")), (40, 10, ()), (70, 14, ()), (160, 32, ())],
)
def test_diffusers_loads_the_export_and_gives_the_same_epsilon(
    channels: int, groups: int, classes: tuple[str, ...], tmp_path: Path
) -> None:
    config = ModelConfig(
        model_channels=channels,
        head_channels=channels // 2,
        channel_multipliers=(1, 2, 2),
        attention_resolutions=(4, 2),
        class_conditional=bool(classes),
    )
    spec = ModelSpec(config, ImageConfig(8, 3, classes), DiffusionConfig(timesteps=10))
    model = randomised(spec)
    export_diffusers(model, spec, tmp_path)
    theirs = UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    assert theirs.config.norm_num_groups == groups
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 3, 500, 999])
    labels = torch.tensor([0, 1, 2, 3]) if classes else None
    with torch.no_grad():
        torch.testing.assert_close(
            model(x, t, labels), theirs(x, t, class_labels=labels).sample, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3)])
def test_upsampling_is_nearest_neighbour_then_a_convolution(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = Upsample(32).double()
    x = torch.randn(2, 32, *size, dtype=torch.float64, requires_grad=True)
    plain = layer.conv(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(layer(x), plain)
    gradient = torch.randn_like(plain)
    of = [x, *layer.conv.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(layer(x), of, gradient), torch.autograd.grad(plain, of, gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_diffusers_pipeline_samples_from_the_export(tmp_path: Path) -> None:
    spec = ModelSpec(SMALL, ImageConfig(8, 3), DiffusionConfig(timesteps=10))
    export_diffusers(randomised(spec), spec, tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=10, output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert torch.allclose(pipeline.scheduler.betas.double(), _betas(spec), atol=1e-6)


@pytest.mark.parametrize("steps", [10, 20, 40])
def test_diffusers_ddim_pipeline_gives_our_images_from_the_export(steps: int, tmp_path: Path) -> None:
    spec = ModelSpec(SMALL, ImageConfig(8, 3), DiffusionConfig(schedule="cosine", timesteps=40))
    model = randomised(spec)
    export_diffusers(model, spec, tmp_path)
    pipeline = DDIMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        4, torch.Generator().manual_seed(5), num_inference_steps=steps, use_clipped_model_output=True,
        output_type="np",
    ).images  # fmt: skip
    x_T = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    ours = sample(make_process(spec.diffusion), model, x_T, lambda step: x_T, "ddim", steps)
    ours = ((ours + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
    # diffusers keeps alpha_bar in float32, this project in float64.
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-3, rtol=0)


def _betas(spec: ModelSpec) -> torch.Tensor:
    from pipeline.diffusion.schedules import make_betas

    return make_betas(spec.diffusion)
