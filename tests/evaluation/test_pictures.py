"""The pictures show the model's and the data's own values."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from pipeline.data.index import DatasetIndex
from pipeline.diffusion.process import make_process
from pipeline.evaluation.bits import held_out_bits
from pipeline.evaluation.reading import open_samples
from pipeline.models.sampling import preview, sample_images
from pipeline.pictures import draw, make
from tests.evaluation.common import DIGITS, small_model, write_samples


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """Record the arguments of every drawing function, by name, and still draw."""
    calls: dict[str, tuple[Any, ...]] = {}

    def record(name: str) -> None:
        original = getattr(draw, name)

        def recorded(*arguments: Any) -> None:
            calls[name] = arguments
            original(*arguments)

        monkeypatch.setattr(draw, name, recorded)

    for name in ("save_process_strip", "save_schedules", "save_bound_terms", "save_nearest"):
        record(name)
    return calls


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("L")))) > 10


@pytest.mark.parametrize("most", [100, 7])
def test_the_strip_goes_from_data_to_noise_and_from_noise_to_a_sample(
    train: DatasetIndex,
    tmp_path: Path,
    drawn: dict[str, tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    most: int,
) -> None:
    """With T = 20, in all steps and in 7 of them."""
    monkeypatch.setattr(make, "STRIP_STEPS", most)
    path = make.process_strip(*small_model(), train, tmp_path / "process.png", examples=2, seed=4)
    assert is_picture(path)
    forward, times, reverse, back, _ = drawn["save_process_strip"]
    assert (times[0], times[-1], back) == (0, 20, times[::-1])
    assert times == ([0, 2, 5, 8, 10, 12, 15, 18, 20] if most == 100 else [0, 2, 5, 8, 11, 14, 17, 20])
    real, _ = make.real_images(train, small_model()[1], 2)
    np.testing.assert_array_equal(forward[0], make.as_pixels(real))
    # Both noisy ends are the same x_T, except for the little that is left of the image.
    assert np.abs(forward[-1].astype(int) - reverse[0]).max() <= 3
    sample = sample_images(
        *small_model(), torch.arange(2), sampling_steps=min(most, 20), labels=torch.arange(2), seed=4
    )
    np.testing.assert_array_equal(reverse[-1], make.as_pixels(sample))


def test_the_curves_are_those_of_the_schedules(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    _, spec = small_model()
    assert is_picture(make.schedule_curves(spec, tmp_path / "schedules.png"))
    curves, _ = drawn["save_schedules"]
    assert list(curves)[:5] == ["linear", "quadratic", "cosine", "sigmoid", "constant"]
    alpha_bar, snr = curves["this model (cosine)"]
    np.testing.assert_array_equal(alpha_bar, make_process(spec.diffusion).alpha_bar)
    np.testing.assert_allclose(snr, alpha_bar / (1 - alpha_bar))


def test_the_bound_over_t_is_that_of_the_evaluation(
    held_out: DatasetIndex, tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    assert is_picture(make.bound_terms(*small_model(), held_out, tmp_path / "bound.png", examples=8))
    terms, _, steps = drawn["save_bound_terms"]
    exact = held_out_bits(*small_model(), held_out, np.arange(8)).terms
    np.testing.assert_allclose(terms, np.array(exact)[steps - 1], rtol=1e-4)
    assert (steps[0], steps[-1]) == (1, 20)


def test_beside_each_sample_is_the_training_image_nearest_to_it(
    train: DatasetIndex, tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    path = make.nearest_neighbours(*small_model(), train, tmp_path / "nearest.png", count=20)
    assert is_picture(path)
    samples, nearest, *_ = drawn["save_nearest"]
    real = make.as_pixels(make.real_images(train, small_model()[1], train.rows)[0]).reshape(train.rows, -1)
    distance = cdist(samples.reshape(20, -1), real)
    found = np.linalg.norm(samples.reshape(20, -1).astype(float) - nearest.reshape(20, -1), axis=1)
    np.testing.assert_allclose(found, distance.min(axis=1), rtol=1e-6)


def test_a_copy_of_the_last_of_many_training_images_is_found(
    tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    model, spec = small_model()
    copy = make.as_pixels(preview(model, spec, 3))[2]
    others = np.random.default_rng(0).integers(0, 256, (10_100, 8, 8, 1), dtype=np.uint8)
    folder = write_samples(tmp_path / "data", np.concatenate([others, copy[None]]), None)
    make.nearest_neighbours(model, spec, open_samples(str(folder), DIGITS), tmp_path / "out.png", count=3)
    _, nearest, *_ = drawn["save_nearest"]
    np.testing.assert_array_equal(nearest[2], copy)


def text_columns(picture: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    """Return the indices of pixel columns with any black in a box of the picture."""
    return np.flatnonzero((np.asarray(picture.convert("L").crop(box)) < 128).any(0))


def test_rows_of_the_nearest_say_what_they_are_and_columns_which_class(
    train: DatasetIndex, tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    path = make.nearest_neighbours(*small_model(), train, tmp_path / "nearest.png", count=20)
    samples, _, _, columns, names = drawn["save_nearest"]
    assert (columns, names) == (10, list(DIGITS.classes))
    again = sample_images(
        *small_model(),
        torch.arange(20),
        labels=torch.arange(20) % 10,
        sampler="ddim",
        eta=1.0,
        sampling_steps=20,
    )
    np.testing.assert_array_equal(samples, make.as_pixels(again))
    with Image.open(path) as picture:
        bare = draw.grid(samples.repeat(2, axis=0), 10)  # as many tiles, without text
        left, top = picture.width - bare.width, picture.height - bare.height
        assert left > 30 and top > 10
        for row in range(4):
            y = top + row * (bare.height - 1) // 4
            assert len(text_columns(picture, (0, y, left, y + bare.height // 4))) > 20
        # A digit stands above the middle of each column.
        at = text_columns(picture, (left, 0, picture.width, top)) / (bare.width / 10)
        assert set(at.astype(int)) == set(range(10))
        assert np.abs(at % 1 - 0.5).max() < 0.3


def test_an_unconditional_models_grid_has_no_names_and_a_conditional_ones_has(tmp_path: Path) -> None:
    sizes = {}
    for conditional in (True, False):
        path = make.draw_samples(*small_model(conditional=conditional), tmp_path / "grid.png", rows=4)
        with Image.open(path) as picture:
            sizes[conditional] = picture.size
    tile = (sizes[False][0] - 1) // 4
    assert sizes[False] == (4 * tile + 1, 4 * tile + 1)
    assert sizes[True][0] == 10 * tile + 1 and sizes[True][1] > 4 * tile + 1


def test_long_names_stand_upright_and_leave_the_images_their_place(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    draw.save_grid(images, tmp_path / "grid.png", 2, column_names=["a very long class name", "b"])
    with Image.open(tmp_path / "grid.png") as picture:
        bare = draw.grid(images, 2)
        assert picture.width == bare.width and picture.height > bare.height + 100
        below = picture.crop((0, picture.height - bare.height, picture.width, picture.height))
        np.testing.assert_array_equal(np.asarray(below), np.asarray(bare))
        at = text_columns(picture, (0, 0, picture.width, picture.height - bare.height))
        assert at.min() < bare.width / 2 and at.max() > bare.width / 2


def test_a_class_may_have_any_name(tmp_path: Path) -> None:
    model, spec = small_model()
    names = ("two\nlines", "", "x" * 300, "$\\frac{", "\u72ac", *"56789")
    spec = replace(spec, image=replace(spec.image, classes=names))
    assert is_picture(make.draw_samples(model, spec, tmp_path / "samples.png", rows=1, steps=2))
