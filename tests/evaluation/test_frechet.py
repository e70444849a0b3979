from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import sqrtm

from pipeline.errors import InputError
from pipeline.evaluation.frechet import (
    Moments,
    Statistics,
    frechet_distance,
    merge_moments,
    moments_of,
    read_statistics,
    write_statistics,
)


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    return Moments(1001, mean, covariance * 1000)


def random_covariance(generator: np.random.Generator, dims: int) -> np.ndarray:
    factor = generator.normal(size=(dims, dims))
    return factor @ factor.T


def test_distance_of_axis_aligned_gaussians_is_the_closed_form() -> None:
    generator = np.random.default_rng(0)
    mean_a, mean_b = generator.normal(size=(2, 6))
    variance_a, variance_b = generator.uniform(0.1, 3, size=(2, 6))
    closed = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(variance_a) - np.sqrt(variance_b)) ** 2).sum()
    distance = frechet_distance(gaussian(mean_a, np.diag(variance_a)), gaussian(mean_b, np.diag(variance_b)))
    assert distance == pytest.approx(closed, rel=1e-12)


def test_distance_of_correlated_gaussians_is_that_with_scipys_matrix_square_root() -> None:
    generator = np.random.default_rng(1)
    mean_a, mean_b = generator.normal(size=(2, 20))
    a, b = random_covariance(generator, 20), random_covariance(generator, 20)
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(gaussian(mean_a, a), gaussian(mean_b, b)) == pytest.approx(expected, rel=1e-9)


def test_distance_of_rank_one_gaussians_is_the_closed_form() -> None:
    u, v = np.random.default_rng(2).normal(size=(2, 30))
    distance = frechet_distance(gaussian(u * 0, np.outer(u, u)), gaussian(u * 0, np.outer(v, v)))
    assert distance == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-7)


def test_distance_to_itself_is_zero_and_sides_can_be_swapped() -> None:
    generator = np.random.default_rng(3)
    a, b = (moments_of(generator.normal(size=(40, 64)) + shift) for shift in (0, 1))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_merged_moments_are_those_of_one_pass_also_far_from_zero() -> None:
    x = np.random.default_rng(4).normal(size=(500, 7)) + 1e4
    merged = merge_moments(moments_of(part) for part in np.split(x, [1, 3, 200, 420]))
    assert merged.count == 500
    np.testing.assert_allclose(merged.mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(merged.covariance(), np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)


def test_sides_that_cannot_be_compared_are_refused() -> None:
    x = np.random.default_rng(6).normal(size=(5, 4))
    with pytest.raises(InputError, match="one extractor"):
        frechet_distance(moments_of(x), moments_of(x[:, :3]))
    with pytest.raises(InputError, match="at least two"):
        frechet_distance(moments_of(x), moments_of(x[:1]))


def test_published_statistics_are_read_as_they_are_written_by_anybody(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    x, y = generator.normal(size=(60, 5)), generator.normal(size=(60, 5)) + 1
    mean, covariance = x.mean(axis=0), np.cov(x, rowvar=False)
    # As pytorch-fid and EDM write them, and as guided-diffusion does, with images and spatial features beside.
    np.savez(tmp_path / "fid.npz", mu=mean, sigma=covariance)
    np.savez(tmp_path / "batch.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu=mean.astype(np.float32),
             sigma=covariance, mu_s=np.zeros(3), sigma_s=np.eye(3))  # fmt: skip
    write_statistics(str(tmp_path / "ours.npz"), Statistics(moments_of(x)))
    expected = frechet_distance(moments_of(x), moments_of(y))
    for name in ("fid", "batch", "ours"):
        read = read_statistics(str(tmp_path / f"{name}.npz")).features
        assert frechet_distance(read, moments_of(y)) == pytest.approx(expected, rel=1e-5)
    with np.load(tmp_path / "ours.npz") as file:
        np.testing.assert_allclose(file["sigma"], covariance, rtol=1e-12)


def test_files_that_hold_no_statistics_are_refused_in_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}]), sigma=np.eye(1))
    np.save(tmp_path / "plain.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").touch()
    np.savez_compressed(tmp_path / "torn.npz", mu=np.arange(300.0), sigma=np.eye(300))
    torn = bytearray((tmp_path / "torn.npz").read_bytes())
    torn[100:300] = b"\xff" * 200
    (tmp_path / "torn.npz").write_bytes(torn)
    for name in (
        "images.npz",
        "shapes.npz",
        "nan.npz",
        "pickled.npz",
        "plain.npy",
        "text.npz",
        "nowhere.npz",
        "empty.npz",
        "torn.npz",
    ):
        with pytest.raises(InputError, match=f"--reference-statistics .*{name}: [^\n]*$"):
            read_statistics(str(tmp_path / name))
