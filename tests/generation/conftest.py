from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from pipeline.cluster import connect
from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec
from pipeline.models.export import save_model
from pipeline.models.unet import build


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    mine = not ray.is_initialized()
    connect()
    yield
    if mine:
        ray.shutdown()


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny class-conditional model with random weights."""
    config = ModelConfig(model_channels=32, channel_multipliers=(1,), res_blocks=1, class_conditional=True)
    spec = ModelSpec(config, ImageConfig(8, 1, ("a", "b", "c")), DiffusionConfig(timesteps=4))
    torch.manual_seed(0)
    network = build(spec)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return save_model(tmp_path_factory.mktemp("generation") / "model", network.state_dict(), spec)
