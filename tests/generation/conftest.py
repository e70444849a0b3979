from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from pipeline.cluster.session import connect
from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec
from pipeline.models.export import save_model
from pipeline.models.unet import build
from tests.data.common import leave_ray
from tests.data.s3 import s3_server
from tests.generation.common import config, make


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    mine = not ray.is_initialized()
    connect()
    yield
    if mine:
        leave_ray()


@pytest.fixture(autouse=True, scope="package")
def threads() -> Iterator[None]:
    """The sampler sets the number of threads of the process that it runs in, here this one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def save(folder: Path, **changes: object) -> Path:
    """A tiny model with random weights."""
    settings = {"model_channels": 32, "channel_multipliers": (1,), "res_blocks": 1, "class_conditional": True}
    spec = ModelSpec(
        ModelConfig(**settings | changes),  # type: ignore[arg-type]
        ImageConfig(8, 1, ("a", "b", "c")),
        DiffusionConfig(timesteps=4),
        {"data_fingerprint": "f1f2"},
    )
    torch.manual_seed(0)
    network = build(spec)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return save_model(folder, network.state_dict(), spec)


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional model."""
    return save(tmp_path_factory.mktemp("generation") / "model")


@pytest.fixture(scope="package")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows no classes."""
    return save(tmp_path_factory.mktemp("generation") / "unconditional", class_conditional=False)


@pytest.fixture(scope="package")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset; not to be changed."""
    output = tmp_path_factory.mktemp("generation") / "whole"
    assert make(config(output), model)["count"] == 40
    return output


@pytest.fixture(scope="package")
def bucket() -> Iterator[str]:
    """A bucket of an S3 server on this machine."""
    with s3_server("samples") as uri:
        yield uri
