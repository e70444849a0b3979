"""Our figures equal those of the field's packages on the same features."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from pipeline.evaluation.frechet import frechet_distance, merge_moments, moments_of
from pipeline.evaluation.inception import inception_score
from pipeline.evaluation.kernel import kernel_distance, squared_mmd
from pipeline.evaluation.neighbours import precision_recall

INSTALLED = Path(sys.prefix) / "references"


@pytest.fixture(scope="module")
def features() -> dict[str, np.ndarray]:
    """Features of 400 images per side, with heavy tails, rounded to float32 as networks give them."""
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(48, 48)) / 7
    real = np.abs(generator.normal(size=(400, 48)) @ mix)
    fake = np.abs(generator.normal(0.15, 0.9, size=(400, 48)) @ mix)
    given = {"real": real, "fake": fake, "logits": generator.normal(0, 3, size=(250, 20))}
    return {name: values.astype(np.float32).astype(np.float64) for name, values in given.items()}


@pytest.fixture(scope="module")
def theirs(features: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Any:
    if not INSTALLED.exists():
        pytest.skip(f"{INSTALLED} is not there: make setup installs tests/references.txt into it")
    file = tmp_path_factory.mktemp("references") / "features.npz"
    np.savez(file, allow_pickle=False, **features)
    script = Path(__file__).with_name("references.py")
    done = subprocess.run(
        [sys.executable, str(script), str(INSTALLED), str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_frechet_distance_from_streamed_moments(features: dict[str, np.ndarray], theirs: Any) -> None:
    sides = [
        merge_moments(moments_of(part) for part in np.array_split(features[name], 7))
        for name in ("real", "fake")
    ]
    ours = frechet_distance(*sides)
    assert ours > 0.5
    assert theirs["frechet"].keys() == {"pytorch-fid", "clean-fid", "torch-fidelity"}
    for name, value in theirs["frechet"].items():
        assert ours == pytest.approx(value, rel=1e-6), name


def test_the_kernel_distance(features: dict[str, np.ndarray], theirs: Any) -> None:
    ours = squared_mmd(features["real"], features["fake"])
    assert theirs["kernel"].keys() == {"clean-fid", "torch-fidelity"}
    for name, value in theirs["kernel"].items():
        assert ours == pytest.approx(value, rel=1e-6), name
    mean, stderr, _ = kernel_distance(features["real"], features["fake"])
    assert mean == pytest.approx(ours, abs=4 * stderr)
    assert ours > stderr


def test_precision_and_recall(features: dict[str, np.ndarray], theirs: Any) -> None:
    ours = precision_recall(features["real"], features["fake"], 3)
    assert len({0.0, 1.0, *ours}) == 4  # neither side lies wholly inside the other
    expected = (theirs["precision"]["torch-fidelity"], theirs["recall"]["torch-fidelity"])
    assert ours == pytest.approx(expected, abs=1e-6)


def test_the_inception_score(features: dict[str, np.ndarray], theirs: Any) -> None:
    ours = inception_score(softmax(features["logits"], axis=1), 50)
    expected = (theirs["inception_score"]["torch-fidelity"], theirs["inception_score_std"]["torch-fidelity"])
    assert ours == pytest.approx(expected, rel=1e-6)
