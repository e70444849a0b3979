from itertools import product

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.evaluation.kernel import kernel_distance, squared_mmd


def test_squared_mmd_is_that_of_a_double_loop() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(6, 4)), generator.normal(size=(5, 4)) + 0.5

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((sum(p * q for p, q in zip(a, b, strict=True)) / 4 + 1) ** 3)

    within_x = np.mean([kernel(x[i], x[j]) for i, j in product(range(6), repeat=2) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i, j in product(range(5), repeat=2) if i != j])
    between = np.mean([kernel(a, b) for a, b in product(x, y)])
    assert squared_mmd(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-12)


def test_distance_of_equal_distributions_is_zero_within_its_error_which_is_calibrated() -> None:
    generator = np.random.default_rng(1)
    scores = []
    for _ in range(200):
        distance, error, _ = kernel_distance(*generator.normal(size=(2, 400, 4)), subset_size=20)
        scores.append(distance / error)
    # A mean other than 0 shows a bias. A spread other than 1 shows an error that is too small or too large.
    assert abs(np.mean(scores)) < 4 / np.sqrt(len(scores))
    assert 0.8 < np.std(scores) < 1.25


def test_distance_of_shifted_gaussians_is_the_closed_form_within_its_error() -> None:
    generator = np.random.default_rng(2)
    real, fake = generator.normal(size=(6000, 1)), generator.normal(size=(6000, 1)) + 1
    # In one dimension the kernel is sum of C(3, i) (x y)^i, so MMD^2 is sum of C(3, i) (E x^i - E y^i)^2:
    # moments 0, 1, 0 of N(0, 1) and 1, 2, 4 of N(1, 1).
    expected = 3 * (0 - 1) ** 2 + 3 * (1 - 2) ** 2 + (0 - 4) ** 2
    distance, error, covered = kernel_distance(real, fake, subset_size=350)
    assert covered == 17 * 350
    assert abs(distance - expected) < 4 * error
    assert error < 0.1 * expected


def test_order_of_the_data_is_shuffled_away_by_a_function_of_the_seed() -> None:
    generator = np.random.default_rng(3)
    # With sorted data, subsets without shuffling would compare opposite ends and never the whole.
    real = np.sort(generator.normal(size=(2000, 1)), axis=0)
    fake = np.sort(generator.normal(size=(2000, 1)), axis=0)[::-1]
    distance, error, covered = kernel_distance(real, fake, subset_size=100, seed=7)
    assert abs(distance) < 4 * error
    assert (distance, error, covered) == kernel_distance(real, fake, subset_size=100, seed=7)
    assert (distance, error, covered) != kernel_distance(real, fake, subset_size=100, seed=8)


def test_too_few_images_or_other_features_are_refused() -> None:
    x = np.zeros((30, 3))
    with pytest.raises(InputError, match="at least 20 images"):
        kernel_distance(x, x[:19])
    with pytest.raises(InputError, match="one extractor"):
        kernel_distance(x, x[:, :2])
