import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cluster.pool import in_process
from pipeline.data.index import DatasetIndex
from pipeline.errors import InputError
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation.classifier import Classifier, save_classifier
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.reading import read_images
from pipeline.models.export import save_model
from tests.evaluation.common import DIGITS, small_model, write_samples


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, spec = small_model()
    return save_model(tmp_path_factory.mktemp("model") / "model", model.state_dict(), spec)


@pytest.fixture
def real_copies(held_out: DatasetIndex, tmp_path: Path) -> Path:
    """The held-out images as if they were samples: a perfect generator."""
    images, labels = read_images(held_out, np.arange(held_out.rows))
    return write_samples(tmp_path / "copies", images.permute(0, 2, 3, 1).numpy(), labels.numpy())


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """Pixels without meaning, and labels at random."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (200, 8, 8, 1), dtype=np.uint8)
    return write_samples(tmp_path / "noise", pixels, generator.integers(0, 10, 200))


def test_a_perfect_generator_equals_the_real_yardstick_and_noise_is_far_from_it(
    cluster: None, digits: Path, model_folder: Path, real_copies: Path, noise: Path, tmp_path: Path
) -> None:
    """The first evaluation by actors, the second in this process."""
    output = tmp_path / "out"
    config = EvaluateConfig(
        model="", data=str(digits), samples=str(real_copies), output=str(output),
        max_images=20, classifier_steps=200, actors=1,
    )  # fmt: skip
    metrics = evaluate(config, str(model_folder))
    names = ("frechet_distance", "kernel_distance", "precision", "recall", "knn_label_accuracy")
    for name in names:
        assert metrics[name] == pytest.approx(metrics[f"{name}_real"], rel=1e-6)
    assert metrics["samples"] == metrics["samples_real"]
    assert metrics["knn_label_accuracy"] > 0.95
    assert metrics["classifier_accuracy"] > 0.9
    assert metrics["precision"] > 0.7
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert (output / "terms.png").stat().st_size > 0

    rows = list(csv.DictReader((output / "terms.csv").open()))
    assert [row["term"] for row in rows] == [f"L_{t}" for t in range(21)]
    total = sum(float(row["bits_per_dim"]) for row in rows)
    assert total == pytest.approx(metrics["bits_per_dim"], rel=1e-9)

    # The classifier of the first evaluation measures the second on the same scale.
    config = EvaluateConfig(
        model="", data=str(digits), samples=str(noise), features=str(output / "classifier"),
        metrics=("frechet", "kernel", "manifold", "knn"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "ActorPool", lambda *_: in_process)
        worse = evaluate(config, "")
    assert worse["frechet_distance_real"] == pytest.approx(metrics["frechet_distance_real"], rel=1e-9)
    assert worse["frechet_distance"] > 20 * metrics["frechet_distance"]
    assert worse["kernel_distance"] > 5 * worse["kernel_distance_stderr"]
    assert worse["precision"] < 0.2
    assert worse["knn_label_accuracy"] < 0.25
    assert "bits_per_dim" not in worse


@pytest.mark.usefixtures("evaluated_here")
def test_an_image_that_cannot_be_decoded_is_named_in_one_line(
    digits: Path, tmp_path: Path, noise: Path
) -> None:
    image = [{"bytes": b"no image", "path": "torn.png"}]
    pq.write_table(pa.table({"image": image, "label": [0]}), noise / "torn.parquet")
    classifier = tmp_path / "classifier"
    save_classifier(str(classifier), Classifier(DIGITS), DIGITS, 0.5)
    config = EvaluateConfig(
        model="", data=str(digits), samples=str(noise), features=str(classifier), metrics=("frechet",)
    )
    with pytest.raises(InputError, match=r"torn\.png"):
        evaluate(config, "")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"metrics": ("knn",)}, "without --samples"),
        ({"split": "tests"}, "split 'tests'"),
        ({"data": "nowhere"}, "no such folder"),
        ({"output": "pyproject.toml/x"}, "not a folder"),
        ({"samples": "nowhere"}, "no such file or folder"),
        ({"samples": "noise", "metrics": ("kernel",), "max_features": 19}, "at least 20 images a side"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    digits: Path, model_folder: Path, noise: Path, options: dict[str, object], reason: str
) -> None:
    settings = {"model": "", "data": str(digits), "max_images": 2, "metrics": ("bits",)}
    if "samples" in options:
        settings["metrics"] = ("frechet",)
        options = options | {"samples": str(noise.with_name(str(options["samples"])))}
    with pytest.raises(InputError, match=reason) as error:
        evaluate(EvaluateConfig(**settings | options), str(model_folder))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_gpu_that_the_cluster_lacks_is_refused(cluster: None, digits: Path, model_folder: Path) -> None:
    config = EvaluateConfig("", str(digits), max_images=2, metrics=("bits",), gpu=True)
    with pytest.raises(InputError, match="no GPU"):
        evaluate(config, str(model_folder))
