"""Small models and datasets for the tests of this folder."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec, Variance
from pipeline.data.images import encode_png
from pipeline.models.unet import UNet, build

DIGITS = ImageConfig(size=8, channels=1, classes=tuple("0123456789"))


def small_model(
    variance: Variance = "fixed_small", timesteps: int = 20, conditional: bool = True
) -> tuple[UNet, ModelSpec]:
    """Return an untrained UNet for digits with random, nonzero output, and its spec."""
    config = ModelConfig(
        model_channels=32,
        channel_multipliers=(1,),
        res_blocks=1,
        attention_resolutions=(),
        class_conditional=conditional,
    )
    spec = ModelSpec(
        config, DIGITS, DiffusionConfig(schedule="cosine", timesteps=timesteps, variance=variance)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(spec).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model, spec


def write_samples(folder: Path, pixels: np.ndarray, labels: np.ndarray | None) -> Path:
    """Write uint8 images [N, H, W, C] as two Parquet files of the Hugging Face convention."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(np.arange(len(pixels)), 2)):
        images = [{"bytes": encode_png(pixels[i]), "path": f"{i}.png"} for i in rows]
        chosen = None if labels is None else pa.array(labels[rows], pa.int64())
        table = pa.table(
            {"image": images, "label": pa.nulls(len(rows), pa.int64()) if chosen is None else chosen}
        )
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=50)
    return folder
