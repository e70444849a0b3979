"""An exported model: whole or absent, verified, nothing unpickled; averages as their formulas say."""

from pathlib import Path

import pytest
import torch

from pipeline.config import DiffusionConfig, ImageConfig, ModelSpec
from pipeline.errors import InputError
from pipeline.models.export import load_model, model_fingerprint, save_model
from tests.models.test_unet import PLAIN, SMALL, randomised

SPEC = ModelSpec(SMALL, ImageConfig(8, 1), DiffusionConfig(timesteps=10), {"data_fingerprint": "f"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", randomised(SPEC).state_dict(), SPEC)


def test_a_model_comes_back_as_it_went(folder: Path) -> None:
    model, spec = load_model(folder)
    assert spec == SPEC
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), randomised(SPEC).state_dict().values(), strict=True)
    )
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_replacing_a_model_changes_its_fingerprint(folder: Path) -> None:
    before = model_fingerprint(folder)
    weights = {name: tensor + 1 for name, tensor in randomised(SPEC).state_dict().items()}
    save_model(folder, weights, SPEC)
    assert model_fingerprint(folder) != before


def test_damage_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_model(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    save_model(folder, randomised(PLAIN).state_dict(), SPEC)
    with pytest.raises(InputError, match="damaged"):
        load_model(folder)
