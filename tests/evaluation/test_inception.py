"""Inception figures as guided-diffusion's evaluator computes them, with a small network in Inception's place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.index import DatasetIndex, open_splits
from pipeline.errors import InputError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.inception import inception_score, resized
from pipeline.evaluation.reading import open_samples, read_images
from tests.evaluation.common import write_samples


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tower = nn.Sequential(nn.Conv2d(6, 9, 1), nn.ReLU()), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x)], dim=1)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 6, 3, 100), nn.ReLU())
        self.pool0 = nn.MaxPool2d(2)
        self.mixed_5 = nn.Conv2d(6, 6, 1)
        self.mixed_6 = Mixed()
        self.pool1 = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool1(self.mixed_6(self.mixed_5(self.pool0(self.conv(x)))))


class SmallInception(nn.Module):
    """A small network with the layer names, arguments and resizing of inception-2015-12-05.pt."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.output = Layers(), nn.Linear(12, 10)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        features = self.layers((as_tensorflow(img.float()) - 128) / 128).flatten(1)
        if return_features:
            return features
        bias = None if no_output_bias else self.output.bias
        return F.softmax(F.linear(features, self.output.weight, bias), dim=1)


def as_tensorflow(x: Tensor) -> Tensor:
    """Resize to 299x299 as TensorFlow does: torch's grid sampling, shifted by half a pixel of input and output."""
    moved = [1 / side - 1 / 299 for side in (x.size(3), x.size(2))]
    rows = torch.tensor([[1.0, 0.0, moved[0]], [0.0, 1.0, moved[1]]]).expand(x.size(0), 2, 3)
    grid = F.affine_grid(rows, [x.size(0), x.size(1), 299, 299], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


@pytest.fixture(scope="module")
def network() -> SmallInception:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = SmallInception().eval().requires_grad_(False)
        for parameter in net.parameters():
            parameter.mul_(3)
        return net


@pytest.fixture(scope="module")
def file(network: SmallInception, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    torch.jit.script(network).save(path)
    return str(path)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    return write_samples(tmp_path / "samples", pixels, None)


@pytest.fixture
def data(train: DatasetIndex, tmp_path: Path) -> str:
    """A folder with few digits, since each is resized to 299x299."""
    (tmp_path / "data").mkdir()
    for split, ids in (("train", np.arange(80)), ("validation", np.arange(80, 140))):
        pixels = read_images(train, ids)[0].permute(0, 2, 3, 1).numpy()
        np.savez(tmp_path / "data" / f"{split}.npz", pixels)
    return str(tmp_path / "data")


def colours(index: DatasetIndex) -> Tensor:
    return read_images(index, np.arange(index.rows))[0].expand(-1, 3, -1, -1)


def spatial(network: SmallInception, images: Tensor) -> np.ndarray:
    """Return the first seven channels of a layer's output, flattened from [N, H, W, C], taken by a hook."""
    found = list[Tensor]()
    handle = network.layers.mixed_6.conv.register_forward_hook(lambda *given: found.append(given[2]))
    network(images, return_features=True)
    handle.remove()
    maps: np.ndarray = found[0].permute(0, 2, 3, 1)[..., :7].flatten(1).double().numpy()
    return maps


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    root = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0)).sum()
    return float(gap + np.trace(first + second) - 2 * root)


@pytest.mark.parametrize("side", [8, 32, 33, 256, 299, 512])
def test_images_are_resized_as_the_published_file_does_it(side: int) -> None:
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    torch.testing.assert_close(resized(images), as_tensorflow(images.float()), atol=0.02, rtol=0)


@pytest.mark.usefixtures("evaluated_here")
def test_sfid_and_the_inception_score_are_those_of_the_network_itself(
    data: str, samples: Path, network: SmallInception, file: str, tmp_path: Path
) -> None:
    splits = open_splits(data)
    given: dict[str, Any] = {
        "model": "", "data": data, "samples": str(samples), "features": file,
        "metrics": ("sfid", "inception_score"),
    }  # fmt: skip
    metrics, on, _ = evaluate(EvaluateConfig(**given, output=str(tmp_path / "out")), "")
    assert "resizes itself" in on["images for the features"]
    assert "bilinear to 299x299 as TensorFlow 1" in on["images for sfid"]
    assert "logits without their bias" in on["images for inception_score"]
    fake = colours(open_samples(str(samples), splits["train"].image))
    real, held = colours(splits["train"]), colours(splits["validation"])
    for name, images in (("sfid", fake), ("sfid_real", held)):
        expected = frechet(spatial(network, real), spatial(network, images))
        assert metrics[name] == pytest.approx(expected, rel=1e-3)
    assert metrics["sfid"] > 10 * metrics["sfid_real"]
    for name, images in (("inception_score", fake), ("inception_score_real", held)):
        p = network(images, no_output_bias=True).double().numpy()
        assert metrics[name] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-5)

    # The written statistics have other programs' names and order of values (TensorFlow's).
    statistics = str(tmp_path / "out" / "statistics.npz")
    with np.load(statistics) as found:
        assert set(found) == {"mu", "sigma", "mu_s", "sigma_s"}
        np.testing.assert_allclose(found["mu_s"], spatial(network, real).mean(0), rtol=1e-3, atol=1e-3)
    again = evaluate(EvaluateConfig(**given, reference_statistics=statistics), "").metrics
    assert again["sfid_to_statistics"] == pytest.approx(metrics["sfid"], rel=1e-9)
    np.savez(tmp_path / "other.npz", mu=np.zeros(12), sigma=np.eye(12), mu_s=np.zeros(5), sigma_s=np.eye(5))
    with pytest.raises(InputError, match="of 5 features, --features"):
        evaluate(EvaluateConfig(**given, reference_statistics=str(tmp_path / "other.npz")), "")


def test_the_score_of_parts_is_averaged_and_certain_classes_are_no_error() -> None:
    certain = np.eye(4)[np.arange(400) % 4]
    assert inception_score(certain, 100) == pytest.approx((4, 0))  # four classes, each certain
    assert inception_score(np.full((50, 4), 0.25)) == pytest.approx((1, 0))
    p = np.random.default_rng(0).dirichlet(np.ones(7), 250)
    scores = [inception_score(part)[0] for part in (p[:100], p[100:200], p[200:])]
    assert inception_score(p, 100) == pytest.approx((np.mean(scores), np.std(scores)))


@pytest.mark.parametrize("metric", ["sfid", "inception_score"])
def test_networks_that_lack_the_output_are_refused_before_anything_is_measured(
    metric: Any, digits: Path, samples: Path, tmp_path: Path
) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    torch.jit.script(Plain()).save(tmp_path / "plain.pt")
    given: dict[str, Any] = {"model": "", "data": str(digits), "samples": str(samples), "metrics": (metric,)}
    with pytest.raises(
        InputError, match=f"^--metrics {metric}: the network of --features does not fit[^\n]*$"
    ):
        evaluate(EvaluateConfig(**given, features=str(tmp_path / "plain.pt")), "")
    with pytest.raises(InputError, match=f"^--metrics {metric} needs --features FILE[^\n]*$"):
        evaluate(EvaluateConfig(**given), "")
