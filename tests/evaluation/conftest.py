from pathlib import Path

import pytest

from pipeline.data.index import DatasetIndex, open_splits


@pytest.fixture(scope="session")
def train(digits: Path) -> DatasetIndex:
    return open_splits(str(digits))["train"]


@pytest.fixture(scope="session")
def held_out(digits: Path) -> DatasetIndex:
    return open_splits(str(digits))["validation"]
