from pathlib import Path

import pytest

from pipeline.cluster.pool import in_process
from pipeline.data.index import DatasetIndex, open_splits
from pipeline.evaluation import evaluate


@pytest.fixture
def evaluated_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate` measures in this process. The tests of each measure show that actors give the same."""
    monkeypatch.setattr(evaluate, "ActorPool", lambda *_, **__: in_process)


@pytest.fixture(scope="session")
def train(digits: Path) -> DatasetIndex:
    return open_splits(str(digits))["train"]


@pytest.fixture(scope="session")
def held_out(digits: Path) -> DatasetIndex:
    return open_splits(str(digits))["validation"]
