from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.generation.common import config, make, save


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore the number of threads, which the sampler sets for this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional model."""
    return save(tmp_path_factory.mktemp("generation") / "model")


@pytest.fixture(scope="session")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional model."""
    return save(tmp_path_factory.mktemp("generation") / "unconditional", class_conditional=False)


@pytest.fixture(scope="session")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset. Tests must not change it."""
    output = tmp_path_factory.mktemp("generation") / "whole"
    assert make(config(output), model)["count"] == 40
    return output
