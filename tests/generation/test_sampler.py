"""A sample's bytes depend only on the model, the settings and its index. Bad images are counted."""

import math
from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pipeline.generation.chunks import Chunk
from pipeline.generation.sampler import Renderer, Setup
from pipeline.models.export import load_model, pack_model, save_model
from tests.generation.common import config, digests, make, manifest


def renderer(model: Path, **changes: object) -> Renderer:
    return Renderer(Setup(pack_model(model), config("unused", **changes), "unused", ""))


def test_a_sample_is_the_same_in_any_piece_and_in_any_order(model: Path) -> None:
    made = renderer(model)
    together = made.render(Chunk(0, 24)).images
    alone = [made.render(Chunk(i, i + 1)).images for i in reversed(range(24))]
    assert torch.equal(together, torch.cat(alone[::-1]))
    assert torch.equal(together[5:19], renderer(model).render(Chunk(5, 19)).images)


def test_the_number_of_threads_of_the_process_changes_nothing(model: Path) -> None:
    torch.set_num_threads(1)
    one = renderer(model).render(Chunk(0, 8)).images
    torch.set_num_threads(4)
    many = renderer(model).render(Chunk(0, 8)).images
    assert torch.equal(one, many)


def test_bf16_is_close_to_fp32_and_not_the_same(model: Path) -> None:
    full = renderer(model).render(Chunk(0, 16))
    half = renderer(model, precision="bf16").render(Chunk(0, 16))
    assert half.finite.all()
    assert torch.equal(half.images, renderer(model, precision="bf16").render(Chunk(0, 16)).images)
    assert not torch.equal(half.images, full.images)
    assert (half.images.float() - full.images.float()).abs().mean() < 4


@pytest.mark.slow
def test_a_compiled_network_makes_nearly_the_same_images_and_repeats_them(model: Path) -> None:
    plain = renderer(model).render(Chunk(0, 8)).images.float()
    compiled = renderer(model, compile=True)
    images = compiled.render(Chunk(0, 8)).images
    assert (images.float() - plain).abs().max() <= 1
    assert torch.equal(images, compiled.render(Chunk(0, 8)).images)


def with_bias(model: Path, folder: Path, bias: float) -> Path:
    """Save the model with a last layer of constant output `bias`. An infinite `bias` makes the output not finite."""
    network, spec = load_model(model)
    weights = network.state_dict()
    weights["conv_out.weight"] = torch.zeros_like(weights["conv_out.weight"])
    if math.isinf(bias):  # weights stay finite: the layer before overflows
        weights["conv_norm_out.weight"] = torch.full_like(weights["conv_norm_out.weight"], 3e38)
    else:
        weights["conv_out.bias"] = torch.full_like(weights["conv_out.bias"], bias)
    return save_model(folder, weights, spec)


@pytest.mark.parametrize(("bias", "named"), [(float("inf"), "nonfinite"), (1e6, "blank")])
def test_bad_images_are_counted_and_refused_over_the_limit(
    bias: float, named: str, model: Path, tmp_path: Path
) -> None:
    bad = with_bias(model, tmp_path / "bad", bias)
    settings = config(tmp_path / "out", guidance=1.0)
    for _ in range(2):  # the second run is refused too, though the files exist
        with pytest.raises(InputError, match="40 samples are blank or not finite, more than"):
            make(settings, bad)
    allowed = make(config(tmp_path / "out", guidance=1.0, max_blank_fraction=1.0), bad)
    assert allowed["metrics"][named] == 40
    assert manifest(tmp_path / "out")[named] == 40
    assert len(digests(tmp_path / "out")) == 5


def test_the_first_steps_alpha_bar_is_a_setting_of_the_samples(model: Path, tmp_path: Path) -> None:
    settings = {"sampler": "ddim", "sampling_steps": 3, "count": 8}
    make(config(tmp_path / "plain", **settings), model)
    make(config(tmp_path / "cut", **settings, least_alpha_bar=0.1), model)
    assert digests(tmp_path / "plain") != digests(tmp_path / "cut")
    with pytest.raises(InputError, match=r"least_alpha_bar = 0\.1, now it is 0"):
        make(config(tmp_path / "cut", **settings), model)
    with pytest.raises(InputError, match=r"--least-alpha-bar 1 leaves 0 of the model's \d+ steps"):
        make(config(tmp_path / "none", **settings, least_alpha_bar=1.0), model)
