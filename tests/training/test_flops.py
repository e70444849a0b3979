"""The FLOPs of a training step, and the machine's peak FLOP/s."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec
from pipeline.models.unet import build
from pipeline.training import flops
from pipeline.training.flops import flops_per_image, peak_flops


def spec_of(config: ModelConfig, image: ImageConfig) -> ModelSpec:
    return ModelSpec(config, image, DiffusionConfig())


@pytest.mark.parametrize(
    ("config", "image"),
    [
        (ModelConfig(), ImageConfig(32, 3)),
        (ModelConfig(channel_multipliers=(1, 2, 3, 4), attention_resolutions=(16, 8)), ImageConfig(64, 3)),
        (ModelConfig(fourier_features=(3, 4, 5)), ImageConfig(32, 3)),
        (
            ModelConfig(32, (1,), res_blocks=1, attention_resolutions=(8,), class_conditional=True),
            ImageConfig(8, 1, ("a", "b")),
        ),
    ],
)
def test_flops_are_those_that_torch_counts(config: ModelConfig, image: ImageConfig) -> None:
    spec = spec_of(config, image)
    with torch.device("meta"):
        model = build(spec)
        x, t = torch.empty(1, image.channels, image.size, image.size), torch.zeros(1, dtype=torch.int64)
        labels = t if config.class_conditional else None
        with FlopCounterMode(display=False) as counter:
            model(x, t, labels).sum().backward()
        # torch also counts the sums of the taps in upsampling: they don't depend on the image.
        assert flops_per_image(model, image.size) == pytest.approx(counter.get_total_flops(), rel=0.003)


def test_flops_are_those_of_improved_diffusions_network_of_the_same_shape() -> None:
    # 64 channels, multipliers 1 2 2, two residual blocks, attention at 16x16: the published code takes 9.5 GFLOP/image.
    with torch.device("meta"):
        model = build(spec_of(ModelConfig(), ImageConfig(32, 3)))
    assert flops_per_image(model, 32) == pytest.approx(9.5e9, rel=0.1)


def test_the_peak_is_that_of_a_machine() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), bf16=False) < 1e15


def test_a_slow_first_product_does_not_end_the_measurement_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's first product also loads a library, and its clocks rise only after some work."""
    clock, products = [0.0], [0]
    product = torch.Tensor.__matmul__

    def slow_at_first(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        products[0] += 1
        clock[0] += 0.5 if products[0] == 1 else 0.02 if products[0] < 8 else 0.01
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", slow_at_first)
    monkeypatch.setattr(flops.time, "perf_counter", lambda: clock[0])
    assert peak_flops(torch.device("cpu"), bf16=False) == pytest.approx(2 * 512**3 / 0.01)
