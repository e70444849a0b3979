"""The card of a sample set shows an evaluation's figures, and generation and --verify still accept it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import Evaluation, evaluate
from pipeline.generation.config import GenerateConfig
from tests.generation.common import config, make, save

SECTION = "\n## Measured\n"


class Means(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 4)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "model")


@pytest.fixture
def samples(model: Path, tmp_path: Path) -> Path:
    make(config(tmp_path / "set"), model)
    return tmp_path / "set"


@pytest.fixture
def measured(digits: Path, samples: Path, tmp_path: Path, evaluated_here: None) -> Any:
    torch.jit.script(Means()).save(tmp_path / "means.pt")

    def measure(**changes: Any) -> Evaluation:
        given = {
            "metrics": ("frechet", "kernel"),
            "features": str(tmp_path / "means.pt"),
            "kernel_subset_size": 3,
        }
        return evaluate(EvaluateConfig("", str(digits), str(samples), **given | changes), "")  # type: ignore[arg-type]

    return measure


def test_the_card_shows_the_figures_with_errors_and_what_they_were_measured_on(
    samples: Path, measured: Any
) -> None:
    before = (samples / "README.md").read_text()
    metrics, on, _ = measured()
    after = (samples / "README.md").read_text()
    assert after.startswith(before + SECTION)
    shown = after[len(before) :].replace("\\", "")
    value, error = metrics["kernel_distance"], metrics["kernel_distance_stderr"]
    real, real_error = metrics["kernel_distance_real"], metrics["kernel_distance_stderr_real"]
    assert f"| kernel_distance | {value:.5g} ± {error:.2g} | {real:.5g} ± {real_error:.2g} | 39 |" in shown
    assert f"| frechet_distance | {metrics['frechet_distance']:.5g} | " in shown
    assert "| samples | 40 | 177 |  |" in shown
    assert on["features"].startswith(str(samples.parent / "means.pt"))
    assert "float32 from 0 to 1" in on["images for the features"]
    assert all(f"| {name} | {value} |" in shown for name, value in on.items())


def test_a_card_with_figures_is_verified_and_written_again_as_it_is(
    model: Path, samples: Path, measured: Any
) -> None:
    measured()
    card = (samples / "README.md").read_bytes()
    make(GenerateConfig(output=str(samples), verify=True), model)
    assert make(config(samples), model)["metrics"]["generated"] == 0
    assert (samples / "README.md").read_bytes() == card
    (samples / "README.md").unlink()
    make(config(samples), model)
    assert (samples / "README.md").read_bytes() == card


def test_the_same_evaluation_replaces_its_figures_and_another_stands_beside_them(
    samples: Path, measured: Any
) -> None:
    first = [measured() and (samples / "README.md").read_text() for _ in range(2)]
    assert first[0] == first[1]
    measured(features="classifier", classifier_steps=2, metrics=("frechet",))
    text = (samples / "README.md").read_text()
    assert text.count("| measured on |") == 2
    assert text.startswith(first[0])
    assert "a classifier trained on the real images in 2 steps" in text


def test_figures_of_fewer_samples_leave_the_card_when_the_set_grows(
    model: Path, samples: Path, measured: Any
) -> None:
    measured()
    make(config(samples, count=48), model)
    assert SECTION not in (samples / "README.md").read_text()
    make(GenerateConfig(output=str(samples), verify=True), model)
    measured()
    assert len(json.loads((samples / "figures.json").read_text())["evaluations"]) == 1
    assert "| samples | 48 |" in (samples / "README.md").read_text()
    make(GenerateConfig(output=str(samples), verify=True), model)


@pytest.mark.parametrize("harm", ["busy", "damaged", "gone"])
def test_an_evaluation_ends_well_whatever_becomes_of_the_card(
    harm: str,
    samples: Path,
    measured: Any,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipeline.data import figures

    if harm == "busy":

        def taken(_: str) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(figures, "locked", taken)
    elif harm == "damaged":
        (samples / "figures.json").write_text("[")
    else:
        (samples / "README.md").unlink()
    assert measured().metrics["frechet_distance"] > 0
    said = "the metrics were not added to the card" in capfd.readouterr().err
    assert said == (harm == "busy")
    assert (samples / "README.md").exists() == (harm != "gone")


def test_folders_of_others_get_no_file(samples: Path, measured: Any) -> None:
    for name in ("manifest.json", "settings.json", "README.md"):
        (samples / name).unlink()
    before = sorted(samples.iterdir())
    assert measured().metrics["samples"] == 40
    assert sorted(samples.iterdir()) == before
