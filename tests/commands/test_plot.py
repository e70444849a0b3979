"""Any combination of data and model gives a correct picture or one clear line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.commands import plot
from pipeline.config import ImageConfig
from pipeline.data.images import decode
from pipeline.data.index import Splits, open_splits
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.errors import InputError
from pipeline.models.export import save_model
from pipeline.models.unet import build
from pipeline.pictures import make
from tests.data.common import encode, encoded, picture, write_folder
from tests.evaluation.common import small_model

PICTURES = ["bound.png", "nearest.png", "process.png", "samples.png", "schedules.png"]
GREY = [encode(picture(i, mode="L")) for i in range(12)]
COLOUR = encoded(12)


def save(folder: Path, image: ImageConfig, conditional: bool = False) -> Path:
    """Save a tiny model for such images and return its folder."""
    _, spec = small_model(timesteps=3, conditional=conditional)
    spec = replace(spec, image=image)
    return save_model(folder, build(spec).state_dict(), spec)


def flat(folder: Path, images: list[bytes]) -> Path:
    """Write images into one folder, without classes."""
    folder.mkdir()
    for i, data in enumerate(images):
        (folder / f"{i:04d}.png").write_bytes(data)
    return folder


def drawn(model: Path, data: Path, output: Path) -> list[str]:
    """Draw all pictures, for which the data is opened once, and return their file names."""
    opened = list[str]()

    def counted(uri: str, *how: Any) -> Splits:
        opened.append(uri)
        return open_splits(uri, *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.index.open_splits", counted)
        assert plot.execute(plot.PlotConfig(str(model), str(data), str(output)))["count"] == 5
    assert opened == [str(data)]
    for path in output.iterdir():
        with Image.open(path) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 5
    return sorted(path.name for path in output.iterdir())


@pytest.mark.parametrize(("channels", "images"), [(1, COLOUR), (3, GREY)], ids=["grey model", "colour model"])
def test_images_are_read_with_the_models_channels_and_size(
    channels: int, images: list[bytes], tmp_path: Path
) -> None:
    model = save(tmp_path / "model", ImageConfig(8, channels))
    data = flat(tmp_path / "data", images)
    assert drawn(model, data, tmp_path / "out") == PICTURES
    train = open_splits(str(data), 8)["train"]
    _, spec = small_model(conditional=False)
    real, labels = make.real_images(train, replace(spec, image=ImageConfig(8, channels)), 100)
    assert labels is None
    expected = {decode(data, 8, channels).tobytes() for data in images}
    assert len(real) == train.rows
    assert {image.tobytes() for image in make.as_pixels(real)} <= expected


@pytest.mark.usefixtures("prepared_here")
def test_prepared_images_of_another_size_and_other_channels_fit_the_model(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", COLOUR)
    prepare(PrepareConfig(str(tmp_path / "data"), "folder", str(source), image_size=10))
    model = save(tmp_path / "model", ImageConfig(8, 1))
    assert drawn(model, tmp_path / "data", tmp_path / "out") == PICTURES


def test_a_conditional_model_gets_labels_that_it_knows_and_no_class_for_others(tmp_path: Path) -> None:
    """The data's classes are cat, dog, owl. The model's classes are owl and cat, in this order."""
    image = ImageConfig(12, 3, ("owl", "cat"))
    model, data = save(tmp_path / "model", image, conditional=True), write_folder(tmp_path / "data", COLOUR)
    assert drawn(model, data, tmp_path / "out") == PICTURES
    splits = open_splits(str(data), 12)
    _, spec = small_model(conditional=True)
    found = {}
    for name in splits.indexes:
        pixels, labels = make.real_images(splits[name], replace(spec, image=image), 100)
        assert labels is not None
        found |= dict(zip((p.tobytes() for p in make.as_pixels(pixels)), labels.tolist(), strict=True))
    assert found == {decode(data, 12, 3).tobytes(): (1, 2, 0)[i % 3] for i, data in enumerate(COLOUR)}


def test_labels_outside_of_the_models_classes_are_no_class(tmp_path: Path) -> None:
    model = save(tmp_path / "model", ImageConfig(12, 3, ("cat",)), conditional=True)
    data = write_folder(tmp_path / "data", COLOUR)
    flat(data / "zebra", encoded(48)[12:])
    assert drawn(model, data, tmp_path / "out") == PICTURES


def test_a_conditional_model_beside_data_without_classes(tmp_path: Path) -> None:
    model = save(tmp_path / "model", ImageConfig(12, 3, ("cat", "dog")), conditional=True)
    assert drawn(model, flat(tmp_path / "data", COLOUR), tmp_path / "out") == PICTURES


def test_fewer_images_than_are_shown(tmp_path: Path) -> None:
    model = save(tmp_path / "model", ImageConfig(12, 3))
    assert drawn(model, flat(tmp_path / "data", COLOUR[:2]), tmp_path / "out") == PICTURES


def test_damaged_images_are_passed_over_and_data_of_nothing_else_is_named(tmp_path: Path) -> None:
    model, torn = save(tmp_path / "model", ImageConfig(12, 3)), [data[:60] for data in COLOUR]
    some = flat(tmp_path / "some", [*torn[:3], *encoded(24)])
    assert drawn(model, some, tmp_path / "out") == PICTURES
    real, _ = make.real_images(open_splits(str(some), 12)["train"], small_model(conditional=False)[1], 3)
    assert len(real) == 3
    none = flat(tmp_path / "none", torn)
    with pytest.raises(InputError, match=r"--data \S+none: none of the images in its train can be decoded"):
        plot.execute(plot.PlotConfig(str(model), str(none), str(tmp_path / "no")))


@pytest.mark.slow
def test_pictures_on_an_object_store(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, data = save(tmp_path / "model", ImageConfig(12, 3)), flat(tmp_path / "data", COLOUR)
    result = plot.execute(plot.PlotConfig(str(model), str(data), f"{bucket}/pictures"))
    assert result["output"] == f"{bucket}/pictures"
    found = storage.list_files(f"{bucket}/pictures")
    assert [storage.name(uri) for uri in found] == PICTURES
    assert all(storage.read_bytes(uri).startswith(b"\x89PNG") for uri in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "model"]
