"""The running Fréchet distance is that of the finished set, by an independent computation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg

from pipeline.config import ImageConfig
from pipeline.errors import InputError
from pipeline.evaluation.classifier import Classifier, save_classifier
from pipeline.evaluation.frechet import moments_of, moments_to_bytes
from tests.generation.common import config, make, opened

IMAGE = ImageConfig(8, 1, ("a", "b", "c"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Classifier, np.ndarray]:
    """What an evaluation leaves: a classifier, and moments of real images' features."""
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(1)
    net = Classifier(IMAGE).eval()
    save_classifier(str(folder / "classifier"), net, IMAGE, 0.5)
    features = np.random.default_rng(0).normal(size=(300, 64)) ** 2
    (folder / "reference_moments.npz").write_bytes(moments_to_bytes(moments_of(features)))
    return folder, net, features


def test_the_figure_is_the_distance_of_the_images_in_the_files(
    model: Path, tmp_path: Path, reference: tuple[Path, Classifier, np.ndarray]
) -> None:
    folder, net, real = reference
    shown = make(config(tmp_path, reference=str(folder)), model)["metrics"]["frechet_distance"]
    rows = opened(tmp_path)
    pixels = torch.from_numpy(np.stack([np.asarray(row["image"]) for row in rows]))[:, None]
    with torch.no_grad():
        fake = net.features(pixels).double().numpy()
    a, b = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(a + b)
    expected -= 2 * np.trace(linalg.sqrtm(a @ b + 1e-12 * np.eye(64)).real)
    assert shown == pytest.approx(expected, rel=1e-3)


def test_a_network_for_other_images_is_refused(
    model: Path, tmp_path: Path, reference: tuple[Path, Classifier, np.ndarray]
) -> None:
    other = ImageConfig(16, 1, ("a", "b", "c"))
    save_classifier(str(tmp_path / "other"), Classifier(other), other, 0.5)
    with pytest.raises(InputError, match="trained on images of another size"):
        make(
            config(tmp_path / "o", reference=str(reference[0]), features=str(tmp_path / "other")),
            model,
        )
