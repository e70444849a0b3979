"""An exported model is whole or absent on any storage, holds no pickle, and never mixes two models."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import fsspec
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline import storage
from pipeline.config import DiffusionConfig, ImageConfig, ModelSpec, to_dict
from pipeline.errors import InputError
from pipeline.models.export import (
    load_model,
    model_card,
    model_fingerprint,
    pack_model,
    read_spec,
    save_model,
)
from tests.models.test_unet import PLAIN, SMALL, randomised

SPEC = ModelSpec(SMALL, ImageConfig(8, 1), DiffusionConfig(timesteps=10), {"data_fingerprint": "f"})

OTHER = replace(SPEC, provenance={"data_fingerprint": "g"})


@cache
def first_weights() -> dict[str, torch.Tensor]:
    return randomised(SPEC).state_dict()


@cache
def other_weights() -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in first_weights().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", first_weights(), SPEC)


def test_a_model_comes_back_as_it_went(folder: Path) -> None:
    model, spec = load_model(folder)
    assert spec == SPEC
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), first_weights().values(), strict=True)
    )
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_replacing_a_model_changes_its_fingerprint(folder: Path) -> None:
    before = model_fingerprint(folder)
    save_model(folder, other_weights(), SPEC)
    assert model_fingerprint(folder) != before


def test_damage_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("versions", [7, "x", [1], {"order": 3}, {"format": None}])
def test_damaged_versions_are_named(folder: Path, versions: object) -> None:
    packed = pack_model(folder)
    config = json.dumps(json.loads(packed.config) | {"versions": versions}).encode()
    with pytest.raises(InputError, match="is damaged: its versions are"):
        load_model(packed._replace(config=config))


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    save_model(folder, randomised(PLAIN).state_dict(), SPEC)
    with pytest.raises(InputError, match="damaged"):
        load_model(folder)


@pytest.fixture(params=["disk", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "model") if request.param == "disk" else f"memory://{tmp_path}/model"


def whole(place: str) -> str:
    """Return which of the two models is stored. Its weights and configuration must both match."""
    model, spec = load_model(place)
    for name, wanted, weights in (
        ("first", SPEC, first_weights()),
        ("other", OTHER, other_weights()),
    ):
        if spec == wanted and all(torch.equal(model.state_dict()[key], weights[key]) for key in weights):
            return name
    raise AssertionError("weights and configuration of two models")


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_replacement_that_is_cut_off_anywhere_leaves_the_one_model_or_the_other(
    place: str, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(place, first_weights(), SPEC)
    assert whole(place) == "first"
    write, left = storage.write_atomic, iter(range(writes))

    def cut_off(uri: str, data: bytes) -> None:
        if next(left, None) is None:
            raise OSError("killed")
        write(uri, data)

    monkeypatch.setattr(storage, "write_atomic", cut_off)
    with pytest.raises(OSError, match="killed"):
        save_model(place, other_weights(), OTHER)
    assert whole(place) == ("other" if writes else "first")
    monkeypatch.undo()
    save_model(place, other_weights(), OTHER)
    assert whole(place) == "other"
    assert json.loads(storage.read_bytes(f"{place}/config.json"))["provenance"] == OTHER.provenance


def test_a_reader_beside_a_writer_never_combines_two_models(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer replaces the model between any two reads."""
    save_model(place, first_weights(), SPEC)
    read, models = storage.read_bytes, [(other_weights(), OTHER), (first_weights(), SPEC)]

    def replaced_after(uri: str) -> bytes:
        data = read(uri)
        save_model(place, *models[0])
        models.reverse()
        return data

    monkeypatch.setattr(storage, "read_bytes", replaced_after)
    assert [whole(place) for _ in range(3)] == ["first", "other", "first"]


def test_a_model_of_0_1_0_has_its_configuration_in_config_json_alone(tmp_path: Path) -> None:
    save_file(first_weights(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"is not an exported model: no config\.json in it"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(SPEC)))
    assert whole(str(tmp_path)) == "first"
    # This fingerprint is recorded in datasets that were begun with the model.
    digests = [
        hashlib.sha256((tmp_path / n).read_bytes()).digest() for n in ("config.json", "model.safetensors")
    ]
    assert model_fingerprint(tmp_path) == hashlib.sha256(b"".join(digests)).hexdigest()


def test_what_was_read_once_is_a_model_without_its_folder(folder: Path) -> None:
    packed = pack_model(folder)
    expected = model_fingerprint(folder)
    for file in folder.iterdir():
        file.unlink()
    assert (read_spec(packed), load_model(packed)[1], model_fingerprint(packed)) == (SPEC, SPEC, expected)


def test_equal_models_have_equal_bytes_wherever_they_lie(folder: Path, place: str) -> None:
    assert save_model(place, first_weights(), SPEC) == place
    assert model_fingerprint(place) == model_fingerprint(folder)


def refused(*arguments: object) -> None:
    raise PermissionError(13, "Access Denied")


@pytest.mark.parametrize(
    "part", ["", "checkpoints", "checkpoints/step-000000020-1", "model/model.safetensors"]
)
def test_a_part_of_the_output_of_a_training_is_answered_with_the_place_of_its_model(
    place: str, part: str
) -> None:
    save_model(storage.join(place, "model"), first_weights(), SPEC)
    with pytest.raises(InputError, match=rf"has its model in {re.escape(storage.join(place, 'model'))}$"):
        load_model(storage.join(place, part))


def test_a_model_that_is_not_there_and_one_that_cannot_be_read_are_told_apart(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"model is not an exported model: no model\.safetensors in it"):
        load_model(place)
    save_model(place, first_weights(), SPEC)
    file_system: Callable[..., object] = type(fsspec.core.url_to_fs(place)[0])
    monkeypatch.setattr(file_system, "cat_file", refused)
    with pytest.raises(InputError, match=r"model: can't be read: .*Access Denied"):
        load_model(place)


def test_the_weights_file_says_its_format_and_the_configuration_in_a_fixed_order(folder: Path) -> None:
    """safetensors itself writes several metadata entries in an order that changes between processes."""
    weights = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(weights[:8], "little")
    assert size % 8 == 0
    header = json.loads(weights[8 : 8 + size])
    assert next(iter(header)) == "__metadata__"
    assert list(header["__metadata__"]) == ["format", "config.json"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "config.json": (folder / "config.json").read_text()}
    theirs = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in first_weights().items())


def test_a_card_says_what_the_model_is_and_what_users_wrote_is_only_text(tmp_path: Path) -> None:
    names = ("a|b", "<script>", "line\nend", *map(str, range(200)))
    facts = {"data": "x\n---\nlicense: evil", "data_fingerprint": "f" * 64, "steps": 2, "batch_size": 4}
    spec = ModelSpec(replace(SMALL, class_conditional=True), ImageConfig(8, 1, names), SPEC.diffusion, facts)
    card = model_card(spec)
    matter = card.split("---\n")[1]
    assert yaml.safe_load(matter)["library_name"] == "ray-ddpm"
    assert "203 classes: 0 a\\|b, 1 \\<script\\>, 2 line end, 3 0," in card
    assert "99 96, …." in card
    assert "<script>" not in card
    assert "\nlicense" not in card
    assert "8x8 images of 1 channel(s), cosine schedule, T = 10" in card
