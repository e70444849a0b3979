import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from pipeline.errors import InputError
from pipeline.evaluation import neighbours
from pipeline.evaluation.neighbours import knn_label_accuracy, precision_recall, squared_distances


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ROWS_AT_A_TIME", 7)


def line(*points: float) -> np.ndarray:
    return np.array(points)[:, None]


def test_squared_distances_are_those_of_a_direct_difference_also_far_from_zero() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(20, 5)) + 1e3, generator.normal(size=(11, 5)) + 1e3
    found = np.concatenate([part for _, part in squared_distances(a, b)])
    np.testing.assert_allclose(found, ((a[:, None] - b) ** 2).sum(axis=2), rtol=1e-9)


def test_equal_rows_have_distance_zero_exactly_and_nearly_equal_ones_do_not() -> None:
    points = np.random.default_rng(0).integers(0, 256, (40, 700)).astype(np.float32) / 255
    found = np.concatenate([part for _, part in squared_distances(points, points)])
    assert not found.diagonal().any()
    other = points.copy()
    other[:, 0] += np.float32(1 / 255)
    found = np.concatenate([part for _, part in squared_distances(other, points)])
    np.testing.assert_allclose(found.diagonal(), 1 / 255**2, rtol=1e-4)


def test_a_set_has_full_precision_and_recall_against_itself_and_none_against_one_far_away() -> None:
    points = np.random.default_rng(1).normal(size=(30, 3))
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, points + 100) == (0.0, 0.0)


def test_precision_and_recall_of_points_on_a_line_are_those_counted_by_hand() -> None:
    # Balls with k = 1: real 0±1, 1±1, 10±9; fake 0.5±2, 2.5±2, 30±27.5.
    real, fake = line(0, 1, 10), line(0.5, 2.5, 30)
    assert precision_recall(real, fake, k=1) == (2 / 3, 1.0)
    # Balls: real 0±1, 1±1, 8±7; fake 0.5±0.25, 0.75±0.25, 20±19.25. Fake 20 and real 0 are in no ball.
    real, fake = line(0, 1, 8), line(0.5, 0.75, 20)
    assert precision_recall(real, fake, k=1) == (2 / 3, 2 / 3)
    # A generator of one of two clusters: every sample is precise, and few real images are recalled.
    real = line(0, 0.1, 0.2, 50, 50.1, 50.2)
    assert precision_recall(real, line(0.06, 0.1, 0.14), k=1) == (1.0, 1 / 6)


def test_precision_and_recall_follow_the_definition_written_with_sklearns_neighbours() -> None:
    generator = np.random.default_rng(2)
    real, fake = generator.normal(size=(60, 2)), generator.normal(size=(50, 2)) + 1.5

    def inside(points: np.ndarray, manifold: np.ndarray) -> float:
        reach = NearestNeighbors(n_neighbors=3).fit(manifold).kneighbors()[0][:, -1]
        gaps = np.linalg.norm(points[:, None] - manifold, axis=2)
        return float((gaps <= reach).any(axis=1).mean())

    expected = inside(fake, real), inside(real, fake)
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1
    assert precision_recall(real, fake, k=3) == expected


def test_label_accuracy_on_real_digits_is_sklearns_and_high() -> None:
    pixels, labels = load_digits(return_X_y=True)
    train, test = slice(0, 1400), slice(1400, None)
    expected = KNeighborsClassifier(1).fit(pixels[train], labels[train]).score(pixels[test], labels[test])
    accuracy = knn_label_accuracy(pixels[train], labels[train], pixels[test], labels[test], k=1)
    assert accuracy == expected > 0.95
    expected = KNeighborsClassifier(5).fit(pixels[train], labels[train]).score(pixels[test], labels[test])
    accuracy = knn_label_accuracy(pixels[train], labels[train], pixels[test], labels[test], k=5)
    assert accuracy == pytest.approx(expected, abs=0.005)  # sklearn breaks ties by class number
    wrong = (labels[test] + 1) % 10
    assert knn_label_accuracy(pixels[train], labels[train], pixels[test], wrong) < 0.05


def test_the_most_votes_win_and_among_equals_the_nearer() -> None:
    reference, labels = line(1, 2, 3, 4, 5), np.array([0, 1, 1, 0, 1])
    assert knn_label_accuracy(reference, labels, line(0), np.array([1]), k=3) == 1
    assert knn_label_accuracy(reference, labels, line(0), np.array([0]), k=4) == 1
    assert knn_label_accuracy(reference, labels, line(0), np.array([1]), k=5) == 1


def test_too_few_images_are_refused() -> None:
    points = line(0, 1, 2)
    with pytest.raises(InputError, match="more than 3 images"):
        precision_recall(points, points, k=3)
    with pytest.raises(InputError, match="at least 5 real images"):
        knn_label_accuracy(points, np.zeros(3, int), points, np.zeros(3, int))
