from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pipeline.cluster.pool import ActorPool, in_process
from pipeline.data.images import encode_png
from pipeline.data.index import DatasetIndex
from pipeline.errors import InputError
from pipeline.evaluation import features
from pipeline.evaluation.classifier import (
    accuracy,
    load_classifier,
    save_classifier,
    train_classifier,
)
from pipeline.evaluation.features import measure, open_extractor
from pipeline.evaluation.inception import TorchScriptExtractor, read_torchscript
from pipeline.evaluation.reading import open_samples, read_images
from pipeline.generation.writers import Row, parquet
from tests.evaluation.common import DIGITS, write_samples


class InceptionLike(nn.Module):
    """A network with the calling convention of inception-2015-12-05.pt."""

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        assert img.dtype == torch.uint8
        assert img.size(1) == 3
        x = img.float()
        if not return_features:
            return torch.zeros(img.size(0), 1008)
        return torch.stack([x.mean((1, 2, 3)), x[:, :, 0].mean((1, 2)), x[:, 2].amax((1, 2))], dim=1)


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=3)[:, :1, :, None]


class Rooted(nn.Module):
    """Features that are NaN for images with a bright first pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return (0.5 - x[:, :1, 0, 0]).sqrt()


@pytest.fixture
def inception(tmp_path: Path) -> TorchScriptExtractor:
    torch.jit.script(InceptionLike()).save(tmp_path / "inception.pt")
    return read_torchscript(str(tmp_path / "inception.pt"))


def digit_pixels() -> np.ndarray:
    return (load_digits().images[..., None] * 255 / 16).round().astype(np.uint8)


def test_images_are_found_by_id_across_groups_and_files(tmp_path: Path) -> None:
    pixels, labels = digit_pixels()[:230], load_digits().target[:230]
    index = open_samples(str(write_samples(tmp_path / "samples", pixels, labels)), DIGITS)
    assert index.rows == 230
    ids = np.array([0, 49, 50, 114, 115, 116, 229])
    images, found = read_images(index, ids)
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), pixels[ids])
    np.testing.assert_array_equal(found.numpy(), labels[ids])


def test_samples_without_labels_have_label_minus_one(tmp_path: Path) -> None:
    index = open_samples(str(write_samples(tmp_path / "samples", digit_pixels()[:4], None)), DIGITS)
    assert read_images(index, np.arange(4))[1].tolist() == [-1] * 4


def test_folders_that_hold_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        open_samples(str(tmp_path / "nowhere"), DIGITS)
    with pytest.raises(InputError, match="no Parquet or npz files"):
        open_samples(str(tmp_path), DIGITS)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(InputError, match="not a Parquet file"):
        open_samples(str(tmp_path), DIGITS)


def test_moments_are_numpys_over_all_images_whoever_computes_them(
    cluster: None,
    train: DatasetIndex,
    held_out: DatasetIndex,
    inception: TorchScriptExtractor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "IMAGES_PER_TASK", 300)
    results = [
        measure([train, held_out], inception, keep=0, pool=pool)
        for pool in (in_process, ActorPool(1), ActorPool(2))
    ]
    for index, one, two, three in zip((train, held_out), *results, strict=True):
        images = read_images(index, np.arange(index.rows))[0].numpy().astype(np.float64)
        features_of = images.mean((1, 2, 3)), images[:, 0, 0].mean(1), images.max((1, 2, 3))
        expected = np.stack(features_of, axis=1)
        for result in (one, two, three):
            assert result.moments.count == index.rows
            np.testing.assert_allclose(result.moments.mean, expected.mean(axis=0), rtol=1e-6)
            np.testing.assert_allclose(result.moments.covariance(), np.cov(expected, rowvar=False), rtol=1e-5)
            np.testing.assert_allclose(result.features, expected, rtol=1e-5)
            thumbnails = result.thumbnails.reshape(images.shape)
            np.testing.assert_array_equal(thumbnails, (images / 255).astype(np.float32))
        np.testing.assert_array_equal(two.moments.m2, three.moments.m2)


def test_kept_features_are_those_of_the_chosen_images(
    train: DatasetIndex, inception: TorchScriptExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "IMAGES_PER_TASK", 300)
    (some,), (everything,) = measure([train], inception, keep=40), measure([train], inception, keep=0)
    assert some.features.shape == (40, 3)
    assert some.moments.count == everything.moments.count
    rows = {(*f.tolist(), label) for f, label in zip(everything.features, everything.labels, strict=True)}
    assert {(*f.tolist(), label) for f, label in zip(some.features, some.labels, strict=True)} <= rows


def test_a_plain_torchscript_network_gets_colour_images_in_0_to_1(tmp_path: Path) -> None:
    torch.jit.script(Plain()).save(tmp_path / "plain.pt")
    embed = read_torchscript(str(tmp_path / "plain.pt")).load("cpu")
    images = torch.full((5, 1, 4, 4), 255, dtype=torch.uint8)
    assert torch.equal(embed(images), torch.ones(5, 4))


def test_files_that_are_no_torchscript_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        read_torchscript(str(tmp_path / "nothing.pt"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise" * 100)
    for name in ("pickle.pt", "noise.pt"):
        with pytest.raises(InputError, match="not a TorchScript file"):
            read_torchscript(str(tmp_path / name))


def test_the_classifier_knows_held_out_digits_and_survives_its_folder(
    train: DatasetIndex, held_out: DatasetIndex, tmp_path: Path
) -> None:
    net, score = train_classifier(train, held_out, steps=100)
    assert score > 0.95
    images, labels = read_images(held_out, np.arange(held_out.rows))
    assert accuracy(net, images, labels) == score
    save_classifier(str(tmp_path / "classifier"), net, train.image, score)
    back, image, known = load_classifier(str(tmp_path / "classifier"))
    assert (image, known) == (train.image, score)
    assert torch.equal(back.features(images), net.features(images))
    assert net.features(images).shape == (len(images), 64)
    (tmp_path / "classifier" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="damaged"):
        load_classifier(str(tmp_path / "classifier"))


def test_the_classifier_is_a_function_of_its_seed(train: DatasetIndex, held_out: DatasetIndex) -> None:
    first, second, other = (train_classifier(train, held_out, steps=5, seed=seed)[0] for seed in (1, 1, 2))
    torch.manual_seed(0)
    images = read_images(held_out, np.arange(8))[0]
    assert torch.equal(first(images), second(images))
    assert not torch.allclose(first(images), other(images))


def test_data_without_labels_train_no_classifier(train: DatasetIndex) -> None:
    bare = replace(train, image=replace(train.image, classes=()))
    with pytest.raises(InputError, match="--features FILE"):
        train_classifier(bare, bare)


def test_images_whose_features_are_not_numbers_are_named(tmp_path: Path) -> None:
    torch.jit.script(Rooted()).save(tmp_path / "rooted.pt")
    pixels = np.zeros((120, 8, 8, 1), np.uint8)
    pixels[[3, 70, 71, 90, 91, 92, 93], 0, 0] = 255
    index = open_samples(str(write_samples(tmp_path / "samples", pixels, None)), DIGITS)
    with pytest.raises(InputError) as caught:
        measure([index], read_torchscript(str(tmp_path / "rooted.pt")), keep=10)
    assert "--features: the features of 7 images are not finite: " in str(caught.value)
    assert "part-0.parquet: image 3.png, " in str(caught.value)
    assert str(caught.value).endswith("part-1.parquet: image 91.png, …")


class TooSmall(nn.Module):
    """A network for images of 32x32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


class Brightness(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))


def test_a_network_that_does_not_fit_the_images_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.jit.script(TooSmall()).save(tmp_path / "net.pt")
    embed = read_torchscript(str(tmp_path / "net.pt")).load("cpu")
    assert embed(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 4)
    with pytest.raises(InputError, match=r"fails on images of \[3, 8, 8\]: .*mat1") as caught:
        embed(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="alpha"):
        embed(torch.zeros(2, 4, 32, 32, dtype=torch.uint8))


def test_a_network_may_give_one_number_for_each_image(tmp_path: Path) -> None:
    torch.jit.script(Brightness()).save(tmp_path / "net.pt")
    embed = read_torchscript(str(tmp_path / "net.pt")).load("cpu")
    assert embed(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)).tolist() == [[1.0], [1.0]]


def test_numbers_that_are_no_class_of_the_data_are_no_labels(tmp_path: Path) -> None:
    labels = np.array([0, 9, 10, 500])
    index = open_samples(str(write_samples(tmp_path / "samples", digit_pixels()[:4], labels)), DIGITS)
    assert read_images(index, np.arange(4))[1].tolist() == [0, 9, -1, -1]


@pytest.mark.parametrize("order", [1, -1])
def test_labels_of_samples_that_name_other_classes_are_not_used(tmp_path: Path, order: int) -> None:
    rows = [Row(encode_png(digit_pixels()[i]), i, i, 0) for i in range(4)]
    (tmp_path / "samples.parquet").write_bytes(parquet(rows, DIGITS.classes[::order]))
    index = open_samples(str(tmp_path), DIGITS)
    assert read_images(index, np.arange(4))[1].tolist() == ([0, 1, 2, 3] if order == 1 else [-1] * 4)


def test_a_classifier_is_trained_and_measured_on_the_labelled_images_alone(tmp_path: Path) -> None:
    pixels, labels = digit_pixels()[:300], load_digits().target[:300]
    some = np.where(np.arange(300) % 3, labels, -1)

    def opened(name: str, labels: np.ndarray) -> DatasetIndex:
        return open_samples(str(write_samples(tmp_path / name, pixels, labels)), DIGITS)

    partly, whole, none = opened("partly", some), opened("whole", labels), opened("none", np.full(300, -1))
    net, score = train_classifier(partly, partly, steps=60)
    known = torch.from_numpy(some >= 0)
    images = read_images(whole, np.arange(300))[0]
    assert score == accuracy(net, images[known], torch.from_numpy(labels)[known]) > 0.5
    net, score = train_classifier(whole, none, steps=1)
    assert np.isnan(score)
    save_classifier(str(tmp_path / "classifier"), net, DIGITS, score)
    assert np.isnan(load_classifier(str(tmp_path / "classifier"))[2])
    assert open_extractor(str(tmp_path / "classifier"), DIGITS)[1] == {}
    with pytest.raises(InputError, match="no image has a label"):
        train_classifier(none, whole, steps=1)
