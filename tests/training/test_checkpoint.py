"""Checkpoints: every byte is verified before any is used."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import storage
from pipeline.config import OptimizerConfig
from pipeline.training import checkpoint
from pipeline.training.checkpoint import DamagedCheckpoint
from pipeline.training.state import new_state
from tests.training.common import problem
from tests.training.digit_runs import assert_same


@pytest.fixture
def saved() -> checkpoint.Saved:
    """A checkpoint's content with two averages that differ from each other and from the weights."""
    config, spec = problem()
    averages = OptimizerConfig(ema_decays=(0.9,), ema_lengths=(0.1,))
    state = new_state(dataclasses.replace(config, optimizer=averages), spec, torch.device("cpu"))
    for i, average in enumerate(state.averages):
        for tensor in average:
            tensor.add_(i + 1)
    return checkpoint.capture(state)


@pytest.fixture
def written(tmp_path: Path, saved: checkpoint.Saved) -> Path:
    checkpoint.write(str(tmp_path), saved, {"run_id": "r", "rate": 0.1})
    return tmp_path


def as_0_1_0_wrote_it(folder: Path) -> None:
    """Put all averages into one file, as 0.1.0 did."""
    together = {}
    for i, file in enumerate(sorted(folder.glob("average-*"))):
        together |= {f"{i}/{name}": tensor for name, tensor in load_file(file).items()}
        file.unlink()
    save_file(together, folder / checkpoint.AVERAGES)
    state = json.loads((folder / "state.json").read_text())["state"]
    for name in [name for name in state["sha256"] if name.startswith("average-")]:
        del state["sha256"][name]
    state["sha256"][checkpoint.AVERAGES] = checkpoint._digest((folder / checkpoint.AVERAGES).read_bytes())
    content = {"sha256": checkpoint._digest(checkpoint._canonical(state)), "state": state}
    (folder / "state.json").write_text(json.dumps(content))


def test_an_export_reads_the_first_average_and_no_other(
    written: Path, saved: checkpoint.Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, whole = list[str](), storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: read.append(storage.name(uri)) or whole(uri))
    weights, _ = checkpoint.read_model(str(written))
    assert sorted(read) == ["average-0.safetensors", "state.json", "weights.safetensors"]
    expected = saved.weights | saved.averages[0]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_checkpoints_with_all_averages_in_one_file_stay_readable(
    written: Path, saved: checkpoint.Saved
) -> None:
    before, _ = checkpoint.read_model(str(written))
    as_0_1_0_wrote_it(written)
    assert_same(checkpoint.read(str(written))[0], saved)
    weights, _ = checkpoint.read_model(str(written))
    assert all(torch.equal(weights[name], before[name]) for name in before)
    file = written / checkpoint.AVERAGES
    file.write_bytes(file.read_bytes()[:-1])
    for read in (checkpoint.read, checkpoint.read_model):
        with pytest.raises(DamagedCheckpoint, match=r"averages\.safetensors is damaged"):
            read(str(written))


def test_nothing_in_a_checkpoint_is_a_pickle(written: Path) -> None:
    assert {path.suffix for path in written.iterdir()} == {".safetensors", ".json"}
    assert checkpoint.read(str(written))[1]["run_id"] == "r"


@pytest.mark.parametrize(
    "name",
    [
        "weights.safetensors",
        "average-0.safetensors",
        "average-1.safetensors",
        "optimizer.safetensors",
        "state.json",
    ],
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
    again = f"{names[0]}9"  # the same step, written later, under another name
    checkpoint.write(str(tmp_path / again), saved, {})
    assert checkpoint.complete(str(tmp_path)) == [str(tmp_path / n) for n in (names[2], again, names[0])]
    assert checkpoint.complete(str(tmp_path / "none")) == []
