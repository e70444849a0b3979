"""Checkpoints: every byte is verified before any of it is used."""

from pathlib import Path

import pytest
import torch

from pipeline.training import checkpoint
from pipeline.training.checkpoint import DamagedCheckpoint
from pipeline.training.loop import new_state
from tests.training.common import problem


@pytest.fixture
def written(tmp_path: Path) -> Path:
    checkpoint.write(
        tmp_path, checkpoint.capture(new_state(*problem(), torch.device("cpu"))), {"run_id": "r"}
    )
    return tmp_path


def test_nothing_in_a_checkpoint_is_a_pickle(written: Path) -> None:
    assert {path.suffix for path in written.iterdir()} == {".safetensors", ".json"}
    assert checkpoint.read(written)[1]["run_id"] == "r"


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "averages.safetensors", "optimizer.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_file_is_noticed(written: Path, name: str, damage: str) -> None:
    path = written / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    with pytest.raises(DamagedCheckpoint):
        checkpoint.read(written)
