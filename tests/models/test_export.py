"""An exported model: whole or absent, verified, nothing unpickled; averages as their formulas say."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import DiffusionConfig, ImageConfig, ModelSpec
from pipeline.errors import InputError
from pipeline.models import ema
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


def test_averages_follow_their_decays() -> None:
    values = np.random.default_rng(0).normal(size=50)
    averages = ema.init([torch.tensor([values[0]])], 2)
    expected = [values[0], values[0]]
    for value in values[1:]:
        ema.update_(averages, [torch.tensor([value])], [0.9, 0.99])
        expected = [0.9 * expected[0] + 0.1 * value, 0.99 * expected[1] + 0.01 * value]
    assert [float(a[0]) for a in averages] == pytest.approx(expected, rel=1e-12)


def test_a_power_average_weighs_the_past_by_its_profile() -> None:
    steps, length = 400, 0.1
    gamma = ema.power_gamma(length)
    values = np.sin(np.arange(1, steps + 1) / 40)
    averages = ema.init([torch.zeros(1, dtype=torch.float64)], 1)
    for step, value in enumerate(values, 1):
        ema.update_(averages, [torch.tensor([value])], [ema.power_decay(length, step)])
    tau = np.arange(1, steps + 1)
    profile = tau ** (gamma + 1.0) - (tau - 1) ** (gamma + 1.0)
    assert float(averages[0][0]) == pytest.approx(float((profile * values).sum() / profile.sum()), rel=1e-9)
    center = (gamma + 1) / (gamma + 2)
    assert length == pytest.approx(np.sqrt((gamma + 1) / (gamma + 3) - center**2), rel=1e-9)


def test_another_length_is_reconstructed_from_snapshots() -> None:
    steps, lengths, wanted = 2000, (0.05, 0.1), 0.075
    averages = ema.init([torch.zeros(1, dtype=torch.float64)], 3)
    stored, at, of = list[float](), list[int](), list[float]()
    for step in range(1, steps + 1):
        value = torch.tensor([np.sin(step / 300) + step / steps])
        ema.update_(averages, [value], [ema.power_decay(r, step) for r in (*lengths, wanted)])
        if step % 200 == 0:
            stored += [float(averages[0][0]), float(averages[1][0])]
            at, of = at + [step] * 2, of + list(lengths)
    weights = ema.reconstruction_weights(at, of, steps, wanted)
    assert float(np.dot(weights, stored)) == pytest.approx(float(averages[2][0]), rel=1e-3)
    assert sum(weights) == pytest.approx(1.0, abs=1e-3)
