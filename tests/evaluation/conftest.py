from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipeline.cluster.session import connect
from pipeline.data.index import DatasetIndex, open_dataset
from pipeline.data.shards import PrepareConfig, prepare
from tests.data.common import leave_ray


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """A small Ray, unless one runs already."""
    mine = not ray.is_initialized()
    connect()
    yield
    if mine:
        leave_ray()


@pytest.fixture(scope="package")
def digits(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real handwritten digits as prepared shards: some 1,440 to train on, 360 held out."""
    folder = tmp_path_factory.mktemp("digits")
    prepare(PrepareConfig(output=str(folder), source="digits", validation_fraction=0.2))
    return folder


@pytest.fixture(scope="package")
def train(digits: Path) -> DatasetIndex:
    return open_dataset(str(digits), "train")


@pytest.fixture(scope="package")
def held_out(digits: Path) -> DatasetIndex:
    return open_dataset(str(digits), "validation")
