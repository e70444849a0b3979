"""Checkpoints: every byte is verified before any of it is used."""

from pathlib import Path

import pytest
import torch

from pipeline.training import checkpoint
from pipeline.training.checkpoint import DamagedCheckpoint
from pipeline.training.state import new_state
from tests.training.common import problem


@pytest.fixture
def written(tmp_path: Path) -> Path:
    state = new_state(*problem(), torch.device("cpu"))
    checkpoint.write(str(tmp_path), checkpoint.capture(state), {"run_id": "r", "rate": 0.1})
    return tmp_path


def test_nothing_in_a_checkpoint_is_a_pickle(written: Path) -> None:
    assert {path.suffix for path in written.iterdir()} == {".safetensors", ".json"}
    assert checkpoint.read(str(written))[1]["run_id"] == "r"


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
        checkpoint.read(str(written))


def test_a_number_changed_in_the_state_is_noticed(written: Path) -> None:
    path = written / "state.json"
    path.write_text(path.read_text().replace('"rate": 0.1', '"rate": 0.2'))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        checkpoint.read(str(written))


def test_half_written_checkpoints_are_not_listed_and_the_newest_comes_first(tmp_path: Path) -> None:
    saved = checkpoint.capture(new_state(*problem(), torch.device("cpu")))
    names = [checkpoint.new_name(step) for step in (5, 40, 300)]
    for name in names:
        checkpoint.write(str(tmp_path / name), saved, {})
    (tmp_path / names[1] / "state.json").unlink()
    again = f"{names[0]}9"  # the same step, written later
    checkpoint.write(str(tmp_path / again), saved, {})
    assert checkpoint.complete(str(tmp_path)) == [str(tmp_path / n) for n in (names[2], again, names[0])]
    assert checkpoint.complete(str(tmp_path / "none")) == []
