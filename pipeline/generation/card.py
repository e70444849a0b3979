"""What lies beside the samples: manifest, dataset card, contact sheet."""

import hashlib
import io
import json
import posixpath
import subprocess
import tarfile
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline import __version__, storage
from pipeline.cluster.session import checkout
from pipeline.config import ImageConfig, ModelSpec
from pipeline.data.images import DecodeError, decode
from pipeline.data.manifest import MANIFEST, SAMPLES_FORMAT
from pipeline.errors import InputError
from pipeline.generation import ledger, writers
from pipeline.generation.chunks import Chunk, file_name
from pipeline.generation.config import GenerateConfig
from pipeline.generation.ledger import ChunkRecord
from pipeline.generation.sampler import labels_or_none, sample_labels
from pipeline.redact import one_line
from pipeline.stretches import open_file
from pipeline.versions import VERSIONS

SHEET, SHEET_COLUMNS, SHEET_ROWS = "contact-sheet.png", 16, 4
_LABELS_TOGETHER = 65_536
_TAR_BLOCK = 2**20


def describe(
    config: GenerateConfig,
    output: str,
    spec: ModelSpec,
    about: dict[str, Any],
    whole: dict[Chunk, ChunkRecord],
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
        "versions": VERSIONS,
        "code": {"ray-ddpm": __version__, "commit": _commit(), "torch": torch.__version__},
        **about,
        "arithmetic": sorted({record.arithmetic for record in whole.values()} - {""}),
        "trained_on": spec.provenance,
        "count": sum(record.rows for record in whole.values()),
        "blank": sum(record.blank for record in whole.values()),
        "nonfinite": sum(record.nonfinite for record in whole.values()),
        # Of the files' digests, in order: one number to compare two datasets by.
        "sha256": hashlib.sha256("".join(record.sha256 for record in whole.values()).encode()).hexdigest(),
    }
    suffix = writers.SUFFIX[config.format]
    files = (
        json.dumps(
            {
                "file": file_name(chunk, suffix),
                "rows": record.rows,
                "bytes": record.bytes,
                "sha256": record.sha256,
            }
        )
        for chunk, record in whole.items()
    )
    # One file a line, and no list of them all: there may be a hundred thousand.
    manifest = json.dumps(head, indent=1)[:-2] + ',\n "files": [\n  ' + ",\n  ".join(files) + "\n ]\n}\n"
    storage.write_atomic(storage.join(output, MANIFEST), manifest.encode())
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


def first_images(
    output: str, form: str, chunks: list[Chunk], count: int, image: ImageConfig
) -> list[np.ndarray]:
    """The first samples of a dataset, at most `count`: uint8 [H, W, C] each.

    Args:
        chunks: its files, in order.

    Raises:
        InputError: a file is damaged, though its length is right.
    """
    try:
        encoded = islice(_encoded_images(output, form, chunks, count), count)
        return [decode(data, image.size, image.channels) for data in encoded]
    except (DecodeError, pa.ArrowInvalid, tarfile.TarError) as error:
        raise InputError(
            f"--output {output}: a file is damaged ({one_line(error, 100)}): run the same command with "
            "--verify, then as before"
        ) from None


def _encoded_images(output: str, form: str, chunks: list[Chunk], count: int) -> Iterator[bytes]:
    if form == "png":
        uris = sorted(storage.sizes(storage.join(output, ledger.DATA)), key=posixpath.basename)
        yield from (storage.read_bytes(uri) for uri in uris if uri.endswith(".png"))
        return
    for chunk in chunks:
        with open_file(
            ledger.data_uri(output, chunk, form), ahead=0 if form == "parquet" else _TAR_BLOCK
        ) as file:
            if form == "parquet":
                for batch in pq.ParquetFile(file).iter_batches(count, columns=["image"]):
                    yield from (image["bytes"] for image in batch["image"].to_pylist())
            else:
                with tarfile.open(fileobj=file, mode="r|") as tar:
                    yield from (
                        member_file.read()
                        for member in tar
                        if member.name.endswith(".png") and (member_file := tar.extractfile(member))
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


def _png_metadata(config: GenerateConfig, spec: ModelSpec, whole: dict[Chunk, ChunkRecord]) -> bytes:
    """Rows for every image: label, index and seed are arithmetic, so nothing has to be read."""
    buffer, classes = io.BytesIO(), spec.image.classes
    with pq.ParquetWriter(buffer, writers.png_metadata([], [], 0, classes).schema) as writer:
        for span in _spans(whole):
            ids = torch.arange(span.start, span.stop)
            labels = sample_labels(config, spec, ids)
            values = labels_or_none(labels, len(ids))
            writer.write_table(writers.png_metadata(ids.tolist(), values, config.seed, classes))
    return buffer.getvalue()


def _spans(whole: dict[Chunk, ChunkRecord]) -> Iterator[Chunk]:
    for chunk in whole:
        for start in range(chunk.start, chunk.stop, _LABELS_TOGETHER):
            yield Chunk(start, min(start + _LABELS_TOGETHER, chunk.stop))


def _commit() -> str | None:
    """The commit that the code is of, where it runs from a checkout."""
    root = checkout()
    if not root or not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
