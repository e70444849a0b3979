"""Computes the arrays that draw.py draws, from a model and its data."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DiffusionConfig, ModelSpec
from pipeline.data.groups import read_rows
from pipeline.data.images import DecodeError, decode
from pipeline.data.index import DatasetIndex
from pipeline.diffusion.losses import vlb_term
from pipeline.diffusion.process import make_process, q_sample, snr, spaced_timesteps
from pipeline.diffusion.samplers import sample
from pipeline.diffusion.schedules import SCHEDULES
from pipeline.display import Display
from pipeline.errors import InputError
from pipeline.models.sampling import from_pixels, preview, to_pixels
from pipeline.models.unet import UNet
from pipeline.pictures import draw
from pipeline.redact import printable
from pipeline.rng import Purpose, normal

STRIP_COLUMNS, MOST_COLUMNS = 9, 16
# Most steps of the reverse process in its picture, which shows nine of them.
STRIP_STEPS = 100
BOUND_POINTS = 64
ROWS_AT_A_TIME = 64


def draw_samples(
    model: UNet, spec: ModelSpec, path: Path, *, rows: int = 8, steps: int = 25, seed: int = 0
) -> Path:
    """Draws a grid of DDIM samples. For a class-conditional model, each column shows one class with its name.

    Args:
        path: file for the picture.
        rows: number of rows; for an unconditional model also the number of columns.
        steps: steps of DDIM.
        seed: seed of the samples.

    Returns:
        `path`.
    """
    classes = spec.image.classes[:MOST_COLUMNS] if spec.model.class_conditional else ()
    columns = len(classes) or rows
    images = preview(model, spec, rows * columns, steps=steps, seed=seed, classes=columns)
    draw.save_grid(as_pixels(images), path, columns, column_names=list(map(_shown, classes)))
    return path


def process_strip(
    model: UNet, spec: ModelSpec, index: DatasetIndex, path: Path, *, examples: int = 3, seed: int = 0
) -> Path:
    """Draws the forward process on real images above the model's reverse process, from t = 0 to T and back.

    The reverse process is ancestral sampling in T steps, or in 100 evenly spaced ones if T is larger.

    Args:
        index: dataset of the real images.
        path: file for the picture.
        examples: images of each process.
        seed: seed of the noise.

    Returns:
        `path`.

    Raises:
        InputError: no image can be decoded.
    """
    x_0 = from_pixels(real_images(index, spec, examples)[0])
    process = make_process(spec.diffusion)
    ids, shape = torch.arange(len(x_0)), tuple(x_0.shape[1:])
    T = spec.diffusion.timesteps
    count = min(T, STRIP_STEPS)
    visited = [0, *(t + 1 for t in spaced_timesteps(T, count))]
    steps = [visited[round(place)] for place in np.linspace(0, count, min(STRIP_COLUMNS, count + 1))]
    noise = normal(seed, 0, ids, Purpose.SAMPLING, shape)
    forward = [
        x_0 if t == 0 else q_sample(process, x_0, torch.full((len(x_0),), t - 1), noise) for t in steps
    ]
    reverse: dict[int, Tensor] = {T: noise}

    def keep(step: int, x: Tensor) -> None:
        display.update(step + 1, "")
        reverse[visited[count - 1 - step]] = x

    labels = ids % len(spec.image.classes) if spec.model.class_conditional else None
    with Display(f"plot: {path.name}", count, "steps") as display:
        sample(
            process,
            model,
            noise,
            lambda step: normal(seed, step + 1, ids, Purpose.SAMPLING, shape),
            "ancestral",
            count,
            labels=labels,
            on_step=keep,
        )
    backward = steps[::-1]
    draw.save_process_strip(
        [as_pixels(to_pixels(x)) for x in forward],
        steps,
        [as_pixels(to_pixels(reverse[t])) for t in backward],
        backward,
        path,
    )
    return path


def schedule_curves(spec: ModelSpec, path: Path) -> Path:
    """Draws alpha_bar and SNR of every named schedule at the model's T, and of the model's own schedule."""
    own = make_process(spec.diffusion)
    curves = {
        name: make_process(DiffusionConfig(schedule=name, timesteps=spec.diffusion.timesteps))
        for name in SCHEDULES
    }
    curves[f"this model ({spec.diffusion.schedule})"] = own
    draw.save_schedules({k: (p.alpha_bar.numpy(), snr(p).numpy()) for k, p in curves.items()}, path)
    return path


def bound_terms(
    model: UNet, spec: ModelSpec, index: DatasetIndex, path: Path, *, examples: int = 8, seed: int = 0
) -> Path:
    """Draws the bound's terms L_{t-1} over t, averaged over a few real images, at up to `BOUND_POINTS` of the T steps.

    Raises:
        InputError: no image can be decoded.
    """
    images, labels = real_images(index, spec, examples)
    x_0, ids = from_pixels(images), torch.arange(len(images))
    process = make_process(spec.diffusion)
    # The terms change fastest at small t, so the points are denser there.
    steps = sorted({int(t) for t in np.geomspace(1, len(process), BOUND_POINTS).round()})
    terms = []
    with Display(f"plot: {path.name}", len(steps), "terms") as display:
        for step in steps:
            t = torch.full((len(ids),), step - 1)
            x_t = q_sample(process, x_0, t, normal(seed, step - 1, ids, Purpose.BOUND, tuple(x_0.shape[1:])))
            with torch.inference_mode():
                terms.append(vlb_term(process, model(x_t, t, labels), x_0, x_t, t, clip=True).mean().item())
            display.update(len(terms), "")
    draw.save_bound_terms(np.array(terms), path, np.array(steps))
    return path


def nearest_neighbours(
    model: UNet, spec: ModelSpec, index: DatasetIndex, path: Path, *, count: int = 32, seed: int = 0
) -> Path:
    """Draws samples above the training images nearest to them in pixels, so that copies become visible.

    Raises:
        InputError: no image can be decoded.
    """
    classes = spec.image.classes[:MOST_COLUMNS] if spec.model.class_conditional else ()
    columns = min(len(classes) or MOST_COLUMNS, count)
    classes, count = classes[:columns], count - count % columns
    images = preview(model, spec, count, seed=seed, classes=len(classes))
    flat = images.flatten(1).float()
    nearest, least = images.clone(), torch.full((count,), math.inf)
    with Display(f"plot: {path.name}", index.rows, "images") as display:
        seen = 0
        for real, _ in _chunks(index, spec):
            distance, found = torch.cdist(flat, real.flatten(1).float()).min(1)
            nearer = distance < least
            nearest[nearer], least[nearer] = real[found[nearer]], distance[nearer]
            seen += len(real)
            display.update(seen, "")
    if not seen:
        raise _none_can_be_decoded(index)
    draw.save_nearest(as_pixels(images), as_pixels(nearest), path, columns, list(map(_shown, classes)))
    return path


def real_images(index: DatasetIndex, spec: ModelSpec, count: int) -> tuple[Tensor, Tensor | None]:
    """The first `count` decodable images of a dataset, or all if there are fewer, as the model sees them.

    Returns:
        images of the model's size and channels, uint8 [N, C, H, W], and the model's labels, int64 [N]. A class that the
        model does not know gets the label of "no class". Labels are None for an unconditional model.

    Raises:
        InputError: no image can be decoded.
    """
    chunks, held = list[tuple[Tensor, Tensor]](), 0
    for chunk in _chunks(index, spec):
        chunks.append(chunk)
        held += len(chunk[0])
        if held >= count:
            break
    if not chunks:
        raise _none_can_be_decoded(index)
    images, labels = (torch.cat(parts)[:count] for parts in zip(*chunks, strict=True))
    return images, labels if spec.model.class_conditional else None


def _chunks(index: DatasetIndex, spec: ModelSpec) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields all decodable images in parts, with their labels; see `real_images`."""
    numbers = {name: number for number, name in enumerate(spec.image.classes)}
    known = {label: numbers.get(name, len(numbers)) for label, name in enumerate(index.image.classes)}
    for group in index.groups:
        for start in range(0, group.rows, ROWS_AT_A_TIME):
            table = read_rows(group, np.arange(start, min(start + ROWS_AT_A_TIME, group.rows)))
            images, labels = list[np.ndarray](), list[int]()
            for data, label in zip(table["bytes"].to_pylist(), table["label"].to_pylist(), strict=True):
                with contextlib.suppress(DecodeError):
                    images.append(decode(data, spec.image.size, spec.image.channels))
                    labels.append(known.get(label, len(numbers)))
            if images:
                yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def _shown(name: str) -> str:
    """A class's name in one line, shortened for a picture."""
    name = printable(name)
    return name if len(name) <= 20 else f"{name[:19]}…"


def _none_can_be_decoded(index: DatasetIndex) -> InputError:
    return InputError(f"--data {index.uri}: none of the images in its {index.split} can be decoded")


def as_pixels(images: Tensor) -> np.ndarray:
    """Converts uint8 [N, C, H, W] on any device to a numpy array [N, H, W, C]."""
    pixels: np.ndarray = images.permute(0, 2, 3, 1).cpu().numpy()
    return pixels
