"""A small generation job, and readers of its output."""

import dataclasses
import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import datasets
import torch

from pipeline.cluster.pool import Pool, in_process
from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec
from pipeline.generation.config import GenerateConfig
from pipeline.generation.job import generate
from pipeline.models.export import save_model
from pipeline.models.unet import build


def save(folder: Path, **changes: object) -> Path:
    """Save a tiny model with random weights and return its folder."""
    settings = {"model_channels": 32, "channel_multipliers": (1,), "res_blocks": 1, "class_conditional": True}
    spec = ModelSpec(
        ModelConfig(**settings | changes),  # type: ignore[arg-type]
        ImageConfig(8, 1, ("a", "b", "c")),
        DiffusionConfig(timesteps=4),
        {"data_fingerprint": "f1f2"},
    )
    torch.manual_seed(0)
    network = build(spec)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return save_model(folder, network.state_dict(), spec)


def config(output: Path | str, **changes: Any) -> GenerateConfig:
    """Return the settings of a job with 40 samples in 5 files."""
    base = GenerateConfig(
        model="m", output=str(output), count=40, batch_size=4, rows_per_file=8, seed=3, guidance=1.5
    )
    return dataclasses.replace(base, **changes)


def make(settings: GenerateConfig, model: Path, pool: Pool = in_process) -> dict[str, Any]:
    """Generate, in this process unless `pool` says otherwise, and return the job's result."""
    return generate(settings, model, "models:/m/1", pool)


def digests(output: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in the data folder, by its path there."""
    data = output / "data"
    return {
        str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(data.rglob("*"))
        if path.is_file()
    }


def times(output: Path) -> dict[str, int]:
    """Return the time of the last write of every file in the data folder, ns."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "data").iterdir()}


def manifest(output: Path) -> dict[str, Any]:
    """Return the manifest's content."""
    content: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return content


def opened(output: Path) -> datasets.Dataset:
    """Open the output with Hugging Face's datasets. It gets a cache of its own, since all tests share the default one."""
    cache = output.parent / f"cache-{uuid.uuid4().hex}"
    return datasets.load_dataset(str(output), split="train", cache_dir=str(cache))
