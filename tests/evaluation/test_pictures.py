"""What the pictures show is what the model and the data say."""

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
    """The arguments of everything that is drawn; the drawing goes on."""
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


def test_the_strip_goes_from_data_to_noise_and_from_noise_to_a_sample(
    train: DatasetIndex, tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    path = make.process_strip(*small_model(), train, tmp_path / "process.png", examples=2, seed=4)
    assert is_picture(path)
    forward, times, reverse, back, _ = drawn["save_process_strip"]
    assert (times[0], times[-1], back) == (0, 20, times[::-1])
    real, _ = make.real_images(train, small_model()[1], 2)
    np.testing.assert_array_equal(forward[0], make.as_pixels(real))
    # Both ends of noise are the same x_T, but for the little that is left of the image.
    assert np.abs(forward[-1].astype(int) - reverse[0]).max() <= 3
    sample = sample_images(*small_model(), torch.arange(2), labels=torch.arange(2), seed=4)
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
    path = make.nearest_neighbours(*small_model(), train, tmp_path / "nearest.png", count=16)
    assert is_picture(path)
    samples, nearest, _ = drawn["save_nearest"]
    real = make.as_pixels(make.real_images(train, small_model()[1], train.rows)[0]).reshape(train.rows, -1)
    distance = cdist(samples.reshape(16, -1), real)
    found = np.linalg.norm(samples.reshape(16, -1).astype(float) - nearest.reshape(16, -1), axis=1)
    np.testing.assert_allclose(found, distance.min(axis=1), rtol=1e-6)


def test_a_copy_of_the_last_of_many_training_images_is_found(
    tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    model, spec = small_model()
    copy = make.as_pixels(preview(model, spec, 3))[2]
    others = np.random.default_rng(0).integers(0, 256, (10_100, 8, 8, 1), dtype=np.uint8)
    folder = write_samples(tmp_path / "data", np.concatenate([others, copy[None]]), None)
    make.nearest_neighbours(model, spec, open_samples(str(folder), DIGITS), tmp_path / "out.png", count=3)
    _, nearest, _ = drawn["save_nearest"]
    np.testing.assert_array_equal(nearest[2], copy)
