import csv
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.spatial.distance import cdist

from pipeline.cluster.pool import in_process
from pipeline.data.images import encode_png
from pipeline.data.index import DatasetIndex, open_splits
from pipeline.errors import InputError
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation.classifier import Classifier, save_classifier
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.memorisation import memorised
from pipeline.evaluation.reading import open_samples, read_images
from pipeline.models.export import model_fingerprint, save_model
from pipeline.pictures import draw
from pipeline.versions import VERSIONS
from tests.evaluation.common import DIGITS, small_model, write_samples


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, spec = small_model()
    return save_model(tmp_path_factory.mktemp("model") / "model", model.state_dict(), spec)


@pytest.fixture
def real_copies(held_out: DatasetIndex, tmp_path: Path) -> Path:
    """The held-out images written as samples, as a perfect generator would make."""
    images, labels = read_images(held_out, np.arange(held_out.rows))
    return write_samples(tmp_path / "copies", images.permute(0, 2, 3, 1).numpy(), labels.numpy())


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """Samples of random pixels with random labels."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (200, 8, 8, 1), dtype=np.uint8)
    return write_samples(tmp_path / "noise", pixels, generator.integers(0, 10, 200))


def test_a_perfect_generator_equals_the_real_yardstick_and_noise_is_far_from_it(
    cluster: None, digits: Path, model_folder: Path, real_copies: Path, noise: Path, tmp_path: Path
) -> None:
    """The first evaluation uses actors, the second this process."""
    output = tmp_path / "out"
    config = EvaluateConfig(
        model="", data=str(digits), samples=str(real_copies), output=str(output),
        max_images=20, classifier_steps=80, actors=1,
    )  # fmt: skip
    metrics = evaluate(config, str(model_folder)).metrics
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

    parts = sum(metrics[name] for name in ("L_0", "L_low_noise", "L_high_noise", "L_T"))
    assert parts == pytest.approx(metrics["bits_per_dim"], rel=1e-9)
    assert min(metrics["L_low_noise"], metrics["L_high_noise"]) > 0
    softmax = metrics["bits_per_dim"] - metrics["L_0"] + metrics["L_0_softmax"]
    assert metrics["bits_per_dim_softmax"] == pytest.approx(softmax, rel=1e-6)
    assert 0 < metrics["L_0_softmax"] < metrics["L_0"]
    # Digits have 17 levels, and a pixel's position tells much about its level.
    assert metrics["bits_per_dim_uniform"] == pytest.approx(np.log2(17), abs=0.01)
    assert metrics["bits_per_dim_position_histogram"] < metrics["bits_per_dim_histogram"] - 0.3

    # The second evaluation uses the first one's classifier, so the distances have the same scale.
    config = EvaluateConfig(
        model="", data=str(digits), samples=str(noise), features=str(output / "classifier"),
        metrics=("frechet", "kernel", "manifold", "knn"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "ActorPool", lambda *_, **__: in_process)
        worse = evaluate(config, "").metrics
    assert worse["frechet_distance_real"] == pytest.approx(metrics["frechet_distance_real"], rel=1e-9)
    assert worse["frechet_distance"] > 10 * metrics["frechet_distance"]
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
        ({"metrics": ("knn",)}, "--metrics knn needs --samples"),
        ({"split": "tests"}, "split 'tests'"),
        ({"data": "nowhere"}, "no such folder"),
        ({"output": "pyproject.toml/x"}, "not a folder"),
        ({"samples": "nowhere"}, "no such file or folder"),
        (
            {"samples": "noise", "metrics": ("kernel", "knn", "bits"), "max_features": 3},
            "kernel needs 20, knn needs",
        ),
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


def _generated(folder: Path, pixels: np.ndarray, labels: np.ndarray, model: str) -> Path:
    """Write samples as jobs/generate.py does, with a foreign file that it moved aside."""
    write_samples(folder / "data", pixels, labels)
    write_samples(folder / "foreign", pixels, labels)
    files = [
        {
            "file": file.name,
            "rows": pq.read_metadata(file).num_rows,
            "bytes": file.stat().st_size,
            "sha256": "",
        }
        for file in sorted((folder / "data").iterdir())
    ]
    manifest = {
        "format": "ray-ddpm-samples", "versions": VERSIONS, "model": "models:/digits/1", "count": len(pixels),
        "settings": {"model_fingerprint": model, "format": "parquet"}, "files": files,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_samples_are_those_of_the_manifest_and_of_the_model(
    digits: Path, model_folder: Path, held_out: DatasetIndex, tmp_path: Path
) -> None:
    images, labels = read_images(held_out, np.arange(16))
    pixels = images.permute(0, 2, 3, 1).numpy()
    folder = _generated(tmp_path / "set", pixels, labels.numpy(), model_fingerprint(str(model_folder)))
    assert open_samples(str(folder), DIGITS, model_fingerprint(str(model_folder))).rows == 16
    assert open_splits(str(folder)).indexes["train"].rows <= 16
    assert sum(index.rows for index in open_splits(str(folder)).indexes.values()) == 16

    (folder / "data" / ".hidden").write_bytes(b"")
    assert open_samples(str(folder), DIGITS).rows == 16
    with pytest.raises(InputError, match=r"--samples .*made by models:/digits/1, not by --model"):
        open_samples(str(folder), DIGITS, "of another one")
    for change, reason in (
        (lambda data: shutil.copy(data / "part-0.parquet", data / "part-9.parquet"), "part-9.parquet, which"),
        (lambda data: os.truncate(data / "part-1.parquet", 50), "part-1.parquet is cut short"),
        (lambda data: (data / "part-0.parquet").unlink(), "part-0.parquet is lost"),
    ):
        changed = tmp_path / reason[:6]
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(folder, changed)
        change(changed / "data")
        for read, flag in ((lambda uri: open_samples(uri, DIGITS), "--samples"), (open_splits, "--data")):
            with pytest.raises(InputError, match=f"{flag} .*{reason}.*: wait until jobs/generate.py ends"):
                read(str(changed))


@pytest.mark.parametrize("classes", [0, 1])
def test_data_without_classes_is_refused_before_anything_is_measured(
    classes: int, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    data = tmp_path / "data" / ("one" if classes else "")
    data.mkdir(parents=True)
    for number, pixels in enumerate(images):
        (data / f"{number}.png").write_bytes(encode_png(pixels))
    model, spec = small_model(conditional=False)
    spec = replace(spec, image=replace(spec.image, classes=("one",) * classes))
    folder = save_model(tmp_path / "model", model.state_dict(), spec)
    monkeypatch.setattr(evaluation, "held_out_bits", lambda *_, **__: pytest.fail("measured"))
    config = EvaluateConfig(model="", data=str(tmp_path / "data"), samples=str(noise))
    with pytest.raises(InputError, match="no classifier can be trained: give --features"):
        evaluate(config, str(folder))


@pytest.mark.usefixtures("evaluated_here")
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "conv_out.bias",
            math.nan,
            r"the model's weights are not finite \(1 tensors, the first is conv_out.bias\)",
        ),
        ("conv_norm_out.weight", 3e38, r"--model \S+: its bits/dim are (nan|inf): "),
    ],
)
def test_a_model_that_is_not_finite_has_no_bits_per_dim(
    name: str, value: float, says: str, digits: Path, tmp_path: Path
) -> None:
    model, spec = small_model()
    weights = model.state_dict()
    weights[name] = torch.full_like(weights[name], value)
    folder = save_model(tmp_path / "model", weights, spec)
    output = tmp_path / "figures"
    config = EvaluateConfig(
        str(folder), str(digits), output=str(output), metrics=("bits",), max_images=4, terms=4
    )
    with pytest.raises(InputError, match=says):
        evaluate(config, folder)
    assert not output.exists()


@pytest.mark.usefixtures("evaluated_here")
def test_figures_say_how_many_samples_they_cover(digits: Path, noise: Path) -> None:
    config = EvaluateConfig(
        model="", data=str(digits), samples=str(noise), classifier_steps=2, max_features=70,
        kernel_subset_size=3,
    )  # fmt: skip
    metrics = evaluate(config, "").metrics
    assert metrics["samples"] == 200
    assert metrics["kernel_distance_images"] == 69
    assert metrics["precision_recall_images"] == metrics["knn_label_accuracy_images"] == 70
    assert metrics["samples_real"] == 177
    assert metrics["knn_label_accuracy_images_real"] == 70


@pytest.mark.slow
@pytest.mark.usefixtures("evaluated_here")
def test_samples_teach_a_classifier_as_far_as_they_show_their_class(
    digits: Path, train: DatasetIndex, tmp_path: Path
) -> None:
    """Training images as samples teach as much as real images. With random labels they teach nothing."""
    images, labels = (part.numpy() for part in read_images(train, np.arange(600)))
    pixels, scores = images.transpose(0, 2, 3, 1), list[dict[str, float]]()
    # Given, so that none is trained for features.
    save_classifier(str(tmp_path / "classifier"), Classifier(DIGITS), DIGITS, 0.5)
    for name, given in (("true", labels), ("random", np.random.default_rng(0).permutation(labels))):
        samples = write_samples(tmp_path / name, pixels, given)
        config = EvaluateConfig(
            model="", data=str(digits), samples=str(samples), metrics=("cas",), classifier_steps=50,
            features=str(tmp_path / "classifier"),
        )  # fmt: skip
        scores.append(evaluate(config, "").metrics)
    true, random = scores
    assert true["classification_accuracy_score"] > 0.85
    assert true["classification_accuracy_score"] == pytest.approx(
        true["classification_accuracy_score_real"], abs=0.08
    )
    assert random["classification_accuracy_score"] < 0.3
    assert random["classification_accuracy_score_real"] == true["classification_accuracy_score_real"]
    assert true["classification_accuracy_score_images"] == 600


@pytest.mark.usefixtures("evaluated_here")
def test_copies_of_training_images_are_counted_and_shown(
    digits: Path, train: DatasetIndex, held_out: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, _ = read_images(train, np.arange(0, train.rows, 27))
    others, _ = read_images(held_out, np.arange(held_out.rows))
    pixels = np.concatenate([copies.numpy(), others.numpy()]).transpose(0, 2, 3, 1)
    samples = write_samples(tmp_path / "samples", pixels, None)
    drawn = list[np.ndarray]()
    monkeypatch.setattr(draw, "save_nearest", lambda a, b, path, _: drawn.extend((a, b)) or path.touch())
    metrics = evaluate(
        EvaluateConfig(
            model="", data=str(digits), samples=str(samples), metrics=("memorisation",), classifier_steps=2,
            output=str(tmp_path / "out"),
        ),
        "",
    ).metrics  # fmt: skip
    # All copies count, and about a hundredth of the held-out images by definition of the threshold.
    assert metrics["memorised"] == pytest.approx(len(copies) / len(pixels), abs=0.02)
    assert metrics["memorised_images"] == len(pixels)
    real = read_images(train, np.arange(train.rows))[0].flatten(1).numpy() / 255
    distances = cdist(others.flatten(1).numpy() / 255, real).min(axis=1) / 8
    assert metrics["nearest_training_distance_real"] == pytest.approx(np.median(distances), rel=1e-5)
    assert metrics["nearest_training_distance"] < metrics["nearest_training_distance_real"]
    shown, nearest = drawn
    np.testing.assert_array_equal(shown[:20], nearest[:20])


def test_copies_count_where_held_out_images_are_copies_too() -> None:
    held_out = np.concatenate([np.zeros(3), np.linspace(0.1, 0.5, 97)])
    assert memorised(np.zeros(50), held_out)["memorised"] == 1
    assert memorised(np.full(50, 0.05), held_out)["memorised"] == 0


@pytest.mark.usefixtures("evaluated_here")
def test_figures_that_need_labels_are_left_out_where_some_images_have_none(
    tmp_path: Path, digits: Path, train: DatasetIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three held-out images have no label; nor have samples of classes that the data does not know."""
    images, labels = (part.numpy() for part in read_images(train, np.arange(120)))
    pixels, data = images.transpose(0, 2, 3, 1), tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", range(80)), ("validation", range(80, 120))):
        some = [int(labels[i]) if split == "train" or i % 3 == 0 else None for i in rows]
        encoded = [{"bytes": encode_png(pixels[i]), "path": f"{i}.png"} for i in rows]
        pq.write_table(pa.table({"image": encoded, "label": some}), data / f"{split}.parquet")
    known = write_samples(tmp_path / "known", pixels, labels)
    config = EvaluateConfig(
        model="", data=str(data), samples=str(known), metrics=("knn", "cas"), classifier_steps=2
    )
    metrics = evaluate(config, "").metrics
    assert "knn_label_accuracy" in metrics
    assert not {"knn_label_accuracy_real", "classification_accuracy_score"} & metrics.keys()
    assert capsys.readouterr().err.count("left out where not all images have a label") == 1

    strange = write_samples(tmp_path / "strange", pixels, labels + 400)
    metrics = evaluate(replace(config, data=str(digits), samples=str(strange)), "").metrics
    assert "knn_label_accuracy_real" in metrics
    assert not {"knn_label_accuracy", "classification_accuracy_score"} & metrics.keys()
    assert "a class of the data" in capsys.readouterr().err


@pytest.mark.usefixtures("evaluated_here")
def test_a_network_that_does_not_fit_the_images_is_refused_before_anything_is_measured(
    digits: Path, noise: Path, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "held_out_bits", None)
    torch.jit.script(torch.nn.Conv2d(4, 1, 1)).save(tmp_path / "four.pt")
    config = EvaluateConfig(
        model="",
        data=str(digits),
        samples=str(noise),
        features=str(tmp_path / "four.pt"),
        metrics=("bits", "frechet"),
    )
    with pytest.raises(InputError, match=r"--features: the network fails on images of \[3, 8, 8\]"):
        evaluate(config, str(model_folder))


@pytest.mark.usefixtures("evaluated_here")
def test_the_distance_to_published_statistics_is_that_to_the_images_that_they_are_of(
    digits: Path, train: DatasetIndex, noise: Path, tmp_path: Path
) -> None:
    class Means(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(images, 4)

    torch.jit.script(Means()).save(tmp_path / "means.pt")
    given: dict[str, Any] = {
        "model": "", "data": str(digits), "samples": str(noise), "metrics": ("frechet",),
        "features": str(tmp_path / "means.pt"),
    }  # fmt: skip
    first = evaluate(EvaluateConfig(**given, output=str(tmp_path / "out")), "").metrics
    statistics = str(tmp_path / "out" / "statistics.npz")
    second = evaluate(EvaluateConfig(**given, reference_statistics=statistics), "").metrics
    assert second["frechet_distance_to_statistics"] == pytest.approx(first["frechet_distance"], rel=1e-9)
    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(InputError, match=r"of 7 features, --features .*means.pt gives 12: .*another network"):
        evaluate(EvaluateConfig(**given, reference_statistics=str(tmp_path / "other.npz")), "")
    with pytest.raises(InputError, match="--reference-statistics needs --samples, and --features FILE"):
        evaluate(EvaluateConfig(**given | {"features": "classifier"}, reference_statistics=statistics), "")
