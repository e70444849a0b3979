"""What lies beside the samples: manifest, dataset card, contact sheet."""

import hashlib
import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline import __version__
from pipeline.config import ModelSpec
from pipeline.data import storage
from pipeline.data.index import SAMPLES_FORMAT
from pipeline.generation import ledger, writers
from pipeline.generation.config import GenerateConfig
from pipeline.generation.ledger import Note
from pipeline.generation.plan import Piece, file_name
from pipeline.generation.reading import first_images
from pipeline.generation.sampler import labels_or_none, sample_labels

SHEET, SHEET_COLUMNS, SHEET_ROWS = "contact-sheet.png", 16, 4
_LABELS_TOGETHER = 65_536


def describe(
    config: GenerateConfig, output: str, spec: ModelSpec, about: dict[str, Any], whole: dict[Piece, Note]
) -> None:
    """Writes all that lies beside the samples.

    Args:
        about: the settings, the model and how it was asked for.
    """
    if config.format == "png":
        data = _png_metadata(config, spec, whole)
        storage.write_atomic(storage.join(output, ledger.DATA, ledger.PNG_METADATA), data)
    head = {
        "format": SAMPLES_FORMAT,
        "code": {"ray-ddpm": __version__, "commit": _commit(), "torch": torch.__version__},
        **about,
        "trained_on": spec.provenance,
        "count": sum(note.rows for note in whole.values()),
        "blank": sum(note.blank for note in whole.values()),
        "nonfinite": sum(note.nonfinite for note in whole.values()),
        # Of the files' digests, in order: one number to compare two datasets by.
        "sha256": hashlib.sha256("".join(note.sha256 for note in whole.values()).encode()).hexdigest(),
    }
    suffix = writers.SUFFIX[config.format]
    files = (
        json.dumps(
            {"file": file_name(piece, suffix), "rows": note.rows, "bytes": note.bytes, "sha256": note.sha256}
        )
        for piece, note in whole.items()
    )
    # One file a line, and no list of them all: there may be a hundred thousand.
    manifest = json.dumps(head, indent=1)[:-2] + ',\n "files": [\n  ' + ",\n  ".join(files) + "\n ]\n}\n"
    storage.write_atomic(storage.join(output, ledger.MANIFEST), manifest.encode())
    images = first_images(output, config.format, list(whole), SHEET_COLUMNS * SHEET_ROWS, spec.image)
    storage.write_atomic(storage.join(output, SHEET), _sheet(images))
    storage.write_atomic(storage.join(output, ledger.CARD), card(head, spec, config).encode())


def card(manifest: dict[str, Any], spec: ModelSpec, config: GenerateConfig) -> str:
    """The README.md, with the front matter by which `datasets.load_dataset` opens the folder."""
    files = {
        "parquet": ["data/train-*.parquet"],
        "webdataset": ["data/train-*.tar"],
        "png": ["data/**/*.png", "data/metadata.parquet"],
    }[config.format]
    paths = "".join(f"    - {path}\n" for path in files)
    size, rows = spec.image.size, {**manifest["settings"], **manifest["trained_on"]}
    table = "".join(f"| {key} | {str(value).replace('|', '/')} |\n" for key, value in rows.items())
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path:\n{paths}"
        "tags: [synthetic, ddpm]\n---\n\n"
        f"# {manifest['count']:,} generated images of {size}x{size} pixels\n\n"
        f"![The first of them]({SHEET})\n\n"
        f"Sampled by ray-ddpm {manifest['code']['ray-ddpm']} from `{manifest['model']}`. Sample *i* is a function of "
        "the settings below and of *i*; checksums are in manifest.json.\n\n"
        f"| setting | |\n| --- | --- |\n{table}"
    )


def _sheet(images: list[np.ndarray]) -> bytes:
    """The images [H, W, C] side by side, as PNG."""
    height, width, channels = images[0].shape
    columns = min(SHEET_COLUMNS, len(images))
    canvas = np.full((-(-len(images) // columns) * height, columns * width, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        canvas[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    Image.fromarray(canvas[..., 0] if channels == 1 else canvas).save(buffer, "PNG")
    return buffer.getvalue()


def _png_metadata(config: GenerateConfig, spec: ModelSpec, whole: dict[Piece, Note]) -> bytes:
    """Rows for every image: label, index and seed are arithmetic, so nothing has to be read."""
    buffer, classes = io.BytesIO(), spec.image.classes
    with pq.ParquetWriter(buffer, writers.png_metadata([], [], 0, classes).schema) as writer:
        for span in _spans(whole):
            ids = torch.arange(span.start, span.stop)
            labels = sample_labels(config, spec, ids)
            values = labels_or_none(labels, len(ids))
            writer.write_table(writers.png_metadata(ids.tolist(), values, config.seed, classes))
    return buffer.getvalue()


def _spans(whole: dict[Piece, Note]) -> Iterator[Piece]:
    for piece in whole:
        for start in range(piece.start, piece.stop, _LABELS_TOGETHER):
            yield Piece(start, min(start + _LABELS_TOGETHER, piece.stop))


def _commit() -> str | None:
    """The commit that the code is of, where it runs from a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
