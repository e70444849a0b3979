import numpy as np
import pytest
from scipy.linalg import sqrtm

from pipeline.errors import InputError
from pipeline.evaluation.frechet import (
    Moments,
    frechet_distance,
    merge_moments,
    moments_of,
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
