"""A small convolutional classifier whose features serve the quality metrics, without a download.

It is trained on the labelled data itself, as is common for MNIST. Distances by its features compare models of one
dataset with each other. They are not comparable with published Fréchet inception distances.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import storage
from pipeline.cluster.pool import Pool, in_process
from pipeline.config import ImageConfig, from_dict, to_dict
from pipeline.data.index import DatasetIndex
from pipeline.errors import InputError
from pipeline.evaluation.reading import read_images
from pipeline.evaluation.work import Partial, choose
from pipeline.models.sampling import from_pixels
from pipeline.output import to_json
from pipeline.redact import one_line
from pipeline.rng import Choice, Purpose, generator_seed, uniform

FEATURES = 64
FIRST_WIDTH, WIDTH = 32, 64
NORM_GROUPS = 8
SMALLEST_MAP = 4
TRAINING_IMAGES = 60_000
HELD_OUT_IMAGES = 10_000
WEIGHTS, CONFIG = "model.safetensors", "classifier.json"
FORMAT = "ray-ddpm-classifier"


class Classifier(nn.Module):
    """3x3 convolutions with group norm and ReLU that halve the image down to 4 to 7 pixels; then features; then logits.

    Args:
        image: size, channels and classes of the images.
    """

    def __init__(self, image: ImageConfig) -> None:
        super().__init__()
        halvings = max(0, int(math.log2(image.size / SMALLEST_MAP)))
        layers, width = list[nn.Module](), image.channels
        for level in range(halvings + 1):
            out = WIDTH if level else FIRST_WIDTH
            layers += [nn.MaxPool2d(2)] * (level > 0)
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.GroupNorm(NORM_GROUPS, out), nn.ReLU()]
            width = out
        self.body = nn.Sequential(*layers)
        self.embedding = nn.Linear(width * (image.size // 2**halvings) ** 2, FEATURES)
        self.logits = nn.Linear(FEATURES, len(image.classes))

    def features(self, images: Tensor) -> Tensor:
        """The features before the logits: uint8 [N, C, H, W] to float32 [N, 64].

        Layer norm fixes their scale, so that distances do not grow with the length of the training.
        """
        maps = self.body(from_pixels(images))
        return F.relu(F.layer_norm(self.embedding(maps.flatten(1)), (FEATURES,)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [N, classes]."""
        logits: Tensor = self.logits(self.features(images))
        return logits


def fit(
    image: ImageConfig,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    steps: int = 500,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
) -> Classifier:
    """Trains a classifier with AdamW. The learning rate falls to zero as a half cosine.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N], from 0.
        seed: seed of the initial weights and of the order of the data.
        steps: optimizer steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_seed(seed, 0, 0, Purpose.CLASSIFIER_WEIGHTS))
        net = Classifier(image).to(images.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = _batch(seed, step, len(images), min(batch_size, len(images))).to(images.device)
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def _batch(seed: int, step: int, rows: int, size: int) -> Tensor:
    """The rows of a step's batch, drawn with replacement."""
    ids = torch.arange(step * size, (step + 1) * size)
    return (uniform(seed, 0, ids, Purpose.CLASSIFIER_BATCH)[:, 0] * rows).long()


@torch.no_grad()
def accuracy(net: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of the labelled images whose label has the largest logit, 0 to 1; NaN if no image has a label."""
    images, labels = images[labels >= 0], labels[labels >= 0]
    right = [
        (net(part).argmax(dim=1) == label).sum().item()
        for part, label in zip(images.split(256), labels.split(256), strict=True)
    ]
    return sum(right) / len(labels) if len(labels) else math.nan


@dataclass(frozen=True)
class ClassifierWork:
    """Trains a classifier as one task. The task's ids are the training images, of which it takes the labelled ones."""

    index: DatasetIndex
    held_out: DatasetIndex
    seed: int
    steps: int

    def start(self, device: str) -> Callable[[np.ndarray], Partial]:
        """See `pool.Work`. The partial result holds the weights by name, and the held-out accuracy."""

        def do(ids: np.ndarray) -> Partial:
            images, labels = (part.to(device) for part in read_images(self.index, ids))
            if not (known := labels >= 0).any():
                raise InputError(f"{self.index.uri}: no classifier can be trained: no image has a label")
            net = fit(self.index.image, images[known], labels[known], seed=self.seed, steps=self.steps)
            some = choose(self.held_out.rows, HELD_OUT_IMAGES, self.seed, Choice.CLASSIFIER_TEST)
            score = accuracy(net, *(part.to(device) for part in read_images(self.held_out, some)))
            weights = {name: value.cpu().numpy() for name, value in net.state_dict().items()}
            return weights | {"accuracy": np.array([score])}

        return do


def check_labels(index: DatasetIndex) -> None:
    """Checks that the dataset has at least two classes.

    Raises:
        InputError: it has fewer.
    """
    if (found := len(index.image.classes)) < 2:
        has = "one class" if found else "no labels"
        raise InputError(
            f"--data {index.uri}: {has}, no classifier can be trained: give --features FILE (TorchScript)"
        )


def train_classifier(
    index: DatasetIndex,
    held_out: DatasetIndex,
    *,
    seed: int = 0,
    steps: int = 500,
    most: int = TRAINING_IMAGES,
    pool: Pool = in_process,
) -> tuple[Classifier, float]:
    """Trains a classifier on labelled data.

    Args:
        held_out: split to measure the accuracy on.
        most: most images to train on, chosen by the seed.

    Returns:
        the classifier on the CPU, and its accuracy on `held_out`, 0 to 1.

    Raises:
        InputError: as `check_labels`.
    """
    check_labels(index)
    work = ClassifierWork(index, held_out, seed, steps)
    (result,) = pool(work, [choose(index.rows, most, seed, Choice.CLASSIFIER)], "classifier")
    score = float(result.pop("accuracy")[0])
    net = Classifier(index.image)
    net.load_state_dict({name: torch.from_numpy(value) for name, value in result.items()})
    return net.eval().requires_grad_(False), score


def keep_classifier(
    uri: str,
    index: DatasetIndex,
    held_out: DatasetIndex,
    *,
    seed: int = 0,
    steps: int = 500,
    pool: Pool = in_process,
) -> None:
    """Trains a classifier and saves it in a folder, unless one is there already; see `train_classifier`."""
    if not storage.exists(storage.join(uri, CONFIG)):
        net, score = train_classifier(index, held_out, seed=seed, steps=steps, pool=pool)
        save_classifier(uri, net, index.image, score)


def save_classifier(uri: str, net: Classifier, image: ImageConfig, score: float) -> None:
    """Writes a folder with model.safetensors and classifier.json."""
    about = {"format": FORMAT, "image": to_dict(image), "held_out_accuracy": score}
    storage.write_atomic(storage.join(uri, WEIGHTS), save(net.state_dict()))
    storage.write_atomic(storage.join(uri, CONFIG), to_json(about, indent=1).encode())


def load_classifier(uri: str) -> tuple[Classifier, ImageConfig, float]:
    """Loads a classifier from a folder of `save_classifier`: the network, its images, and its held-out accuracy.

    Raises:
        InputError: the folder holds no classifier, or a damaged one.
    """
    try:
        about = json.loads(storage.read_bytes(storage.join(uri, CONFIG)))
        image = from_dict(ImageConfig, about["image"], CONFIG)
        net = Classifier(image)
        net.load_state_dict(load(storage.read_bytes(storage.join(uri, WEIGHTS))))
        score = about["held_out_accuracy"]
        accuracy = math.nan if score is None else float(score)
    except FileNotFoundError:
        raise InputError(f"--features {uri}: neither a TorchScript file nor a classifier folder") from None
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"--features {uri}: damaged: {one_line(error)}") from None
    return net.eval().requires_grad_(False), image, accuracy
