"""What to draw: from a model and its data to the arrays that draw.py puts on paper."""

import contextlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DiffusionConfig, ModelSpec
from pipeline.data.images import DecodeError, decode
from pipeline.data.index import DatasetIndex, open_dataset, read_rows
from pipeline.diffusion.losses import vlb_term
from pipeline.diffusion.process import make_process, q_sample, snr
from pipeline.diffusion.samplers import sample
from pipeline.errors import InputError
from pipeline.models.export import load_model
from pipeline.models.sampling import sample_images, to_uint8
from pipeline.models.unet import UNet
from pipeline.pictures import draw
from pipeline.rng import Purpose, normal

NAMED_SCHEDULES = ("linear", "quadratic", "cosine", "sigmoid", "constant")
STRIP_COLUMNS = 9
BOUND_POINTS = 64


def sample_grid(model_folder: Path, path: Path, *, rows: int = 8, steps: int = 25, seed: int = 0) -> Path:
    """`draw_samples` of an exported model."""
    return draw_samples(*load_model(model_folder), path, rows=rows, steps=steps, seed=seed)


def draw_samples(
    model: UNet, spec: ModelSpec, path: Path, *, rows: int = 8, steps: int = 25, seed: int = 0
) -> Path:
    """A grid of DDIM samples; for a class-conditional model each column is one class."""
    columns = min(len(spec.image.classes), 16) if spec.model.class_conditional else rows
    ids = torch.arange(rows * columns, device=next(model.parameters()).device)
    labels = ids % columns if spec.model.class_conditional else None
    steps = min(steps, spec.diffusion.timesteps)
    images = sample_images(model, spec, ids, sampler="ddim", sampling_steps=steps, labels=labels, seed=seed)
    draw.save_grid(as_pixels(images.cpu()), path, columns)
    return path


def process_strip(model_folder: Path, data: str, path: Path, *, examples: int = 3, seed: int = 0) -> Path:
    """The forward process on real images above the reverse process of the model, both through all T steps."""
    model, spec = load_model(model_folder)
    x_0 = real_images(open_dataset(data, image_size=spec.image.size), examples)[0].float() / 127.5 - 1
    process = make_process(spec.diffusion)
    ids, shape = torch.arange(examples), tuple(x_0.shape[1:])
    T = spec.diffusion.timesteps
    steps = sorted({int(step) for step in np.linspace(0, T, min(STRIP_COLUMNS, T + 1)).round()})
    noise = normal(seed, 0, ids, Purpose.SAMPLING, shape)
    forward = [
        x_0 if t == 0 else q_sample(process, x_0, torch.full((examples,), t - 1), noise) for t in steps
    ]
    reverse: dict[int, Tensor] = {T: noise}

    def keep(step: int, x: Tensor) -> None:
        if (t := T - 1 - step) in steps:
            reverse[t] = x

    labels = torch.arange(examples) % len(spec.image.classes) if spec.model.class_conditional else None
    sample(
        process,
        model,
        noise,
        lambda step: normal(seed, step + 1, ids, Purpose.SAMPLING, shape),
        "ancestral",
        T,
        labels=labels,
        on_step=keep,
    )
    backward = steps[::-1]
    draw.save_process_strip(
        [as_pixels(to_uint8(x)) for x in forward],
        steps,
        [as_pixels(to_uint8(reverse[t])) for t in backward],
        backward,
        path,
    )
    return path


def schedule_curves(spec: ModelSpec, path: Path) -> Path:
    """alpha_bar and SNR of every named schedule at the model's T, and of the model's own."""
    own = make_process(spec.diffusion)
    curves = {
        name: make_process(DiffusionConfig(schedule=name, timesteps=spec.diffusion.timesteps))
        for name in NAMED_SCHEDULES
    }
    curves[f"this model ({spec.diffusion.schedule})"] = own
    draw.save_schedules({k: (p.alpha_bar.numpy(), snr(p).numpy()) for k, p in curves.items()}, path)
    return path


def bound_terms(model_folder: Path, data: str, path: Path, *, examples: int = 8, seed: int = 0) -> Path:
    """L_{t-1} over t of a few real images, held out where any are, at up to `BOUND_POINTS` of the T steps."""
    model, spec = load_model(model_folder)
    try:
        index = open_dataset(data, "validation", spec.image.size)
    except InputError:
        index = open_dataset(data, image_size=spec.image.size)
    images, labels = real_images(index, examples)
    x_0, ids = images.float() / 127.5 - 1, torch.arange(len(images))
    process = make_process(spec.diffusion)
    known = torch.where(labels < 0, len(spec.image.classes), labels) if spec.model.class_conditional else None
    # Where the terms change fastest, at small t, the points lie close.
    steps = sorted({int(t) for t in np.geomspace(1, len(process), BOUND_POINTS).round()})
    terms = []
    for step in steps:
        t = torch.full((len(ids),), step - 1)
        x_t = q_sample(process, x_0, t, normal(seed, step - 1, ids, Purpose.EVALUATION, tuple(x_0.shape[1:])))
        with torch.inference_mode():
            terms.append(vlb_term(process, model(x_t, t, known), x_0, x_t, t, clip=True).mean().item())
    draw.save_bound_terms(np.array(terms), path, np.array(steps))
    return path


def nearest_neighbours(model_folder: Path, data: str, path: Path, *, count: int = 32, seed: int = 0) -> Path:
    """Samples above the training images closest to them in pixels: copies would show."""
    model, spec = load_model(model_folder)
    ids = torch.arange(count)
    labels = ids % len(spec.image.classes) if spec.model.class_conditional else None
    steps = min(25, spec.diffusion.timesteps)
    images = sample_images(model, spec, ids, sampler="ddim", sampling_steps=steps, labels=labels, seed=seed)
    real, _ = real_images(open_dataset(data, image_size=spec.image.size), 10_000)
    distance = torch.cdist(images.flatten(1).float(), real.flatten(1).float())
    draw.save_nearest(as_pixels(images), as_pixels(real[distance.argmin(1)]), path)
    return path


def real_images(index: DatasetIndex, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images of a dataset, uint8 [N, C, H, W], and their labels, int64 [N]."""
    image, images, labels = index.image, list[np.ndarray](), list[int]()
    for group in index.groups:
        if len(images) >= count:
            break
        table = read_rows(group, np.arange(min(group.rows, count - len(images))))
        for data, label in zip(table["bytes"].to_pylist(), table["label"].to_pylist(), strict=True):
            with contextlib.suppress(DecodeError):
                images.append(decode(data, image.size, image.channels))
                labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def as_pixels(images: Tensor) -> np.ndarray:
    """uint8 [N, C, H, W] to [N, H, W, C]."""
    pixels: np.ndarray = images.permute(0, 2, 3, 1).numpy()
    return pixels
