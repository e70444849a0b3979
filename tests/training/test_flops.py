"""The FLOPs of a training step, and the machine's peak FLOP/s."""

import pytest
import torch

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec
from pipeline.training.flops import flops_per_image, peak_flops


def test_flops_are_those_of_improved_diffusions_network_of_the_same_shape() -> None:
    # 64 channels, multipliers 1 2 2, two residual blocks, attention at 16x16: the published code takes 9.5 GFLOP/image.
    spec = ModelSpec(ModelConfig(), ImageConfig(32, 3), DiffusionConfig())
    assert flops_per_image(spec) == pytest.approx(9.5e9, rel=0.1)


def test_the_peak_is_that_of_a_machine() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), bf16=False) < 1e15
