"""Code lengths without a network, against closed-form entropies and the compressors themselves."""

import io
import lzma

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation import codes
from pipeline.evaluation.codes import trivial_codes


def entropy(p: np.ndarray) -> float:
    return float(-(p * np.log2(p)).sum())


@pytest.mark.parametrize("together", [5, 4096])
def test_histograms_cost_the_entropy_of_what_they_know(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even pixels take four values of unequal frequency. Odd pixels are constant."""
    monkeypatch.setattr(codes, "_POSITIONS_TOGETHER", together)
    generator, values, p = (
        np.random.default_rng(0),
        np.array([3, 90, 91, 250]),
        np.array([0.7, 0.15, 0.1, 0.05]),
    )
    train, images = (np.full((count, 4, 4, 1), 90, np.uint8) for count in (20_000, 4000))
    for some in (train, images):
        some.reshape(len(some), -1)[:, ::2] = generator.choice(values, (len(some), 8), p=p)
    cost = trivial_codes(train, images)
    everywhere = p / 2 + np.array([0, 0.5, 0, 0])
    assert cost["uniform"] == pytest.approx(2, abs=0.002)
    assert cost["histogram"] == pytest.approx(entropy(everywhere), abs=0.01)
    assert cost["position_histogram"] == pytest.approx(entropy(p) / 2, abs=0.01)
    # No code of independent pixels is shorter than the entropy. General compressors need more.
    assert entropy(p) / 2 < cost["xz"] < cost["png"]


def test_a_value_that_training_never_had_costs_much_and_not_infinitely() -> None:
    train, images = np.zeros((50, 2, 2, 3), np.uint8), np.full((3, 2, 2, 3), 7, np.uint8)
    cost = trivial_codes(train, images)
    for name in ("uniform", "histogram", "position_histogram"):
        assert cost[name] == pytest.approx(np.log2(256 / 1e-3), rel=1e-9)


def test_files_cost_what_they_are_long() -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, 5, 5, 3), dtype=np.uint8)
    cost = trivial_codes(images, images)
    length = 0
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        length += len(buffer.getvalue())
    assert cost["png"] == pytest.approx(8 * length / images.size, rel=0.02)
    assert cost["xz"] == 8 * len(lzma.compress(images.tobytes(), preset=9)) / images.size
