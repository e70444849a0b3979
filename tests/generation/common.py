"""A small generation job, and what it wrote."""

import dataclasses
import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import datasets

from pipeline.cluster.pool import Pool, in_process
from pipeline.generation.config import GenerateConfig
from pipeline.generation.job import generate


def config(output: Path | str, **changes: Any) -> GenerateConfig:
    """40 samples in 5 files."""
    base = GenerateConfig(
        model="m", output=str(output), count=40, batch_size=4, rows_per_file=8, seed=3, guidance=1.5
    )
    return dataclasses.replace(base, **changes)


def make(settings: GenerateConfig, model: Path, pool: Pool = in_process) -> dict[str, Any]:
    """Generates in this process, unless told otherwise."""
    return generate(settings, model, "models:/m/1", pool)


def digests(output: Path) -> dict[str, str]:
    """SHA-256 of every file in the data folder, by its place there."""
    data = output / "data"
    return {
        str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(data.rglob("*"))
        if path.is_file()
    }


def times(output: Path) -> dict[str, int]:
    """When every file in the data folder was written."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "data").iterdir()}


def manifest(output: Path) -> dict[str, Any]:
    """The manifest."""
    content: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return content


def opened(output: Path) -> datasets.Dataset:
    """As Hugging Face datasets opens it, with a cache of its own: the usual one is shared by all tests."""
    cache = output.parent / f"cache-{uuid.uuid4().hex}"
    return datasets.load_dataset(str(output), split="train", cache_dir=str(cache))
