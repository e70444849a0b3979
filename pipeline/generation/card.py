"""Writes the files beside the samples: manifest, dataset card and contact sheet."""

import contextlib
import hashlib
import io
import json
import posixpath
import subprocess
import tarfile
import uuid
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
from pipeline.data import figures
from pipeline.data.card import SplitSize, front_matter
from pipeline.data.images import DecodeError, decode, encode_png
from pipeline.data.manifest import CARD, MANIFEST, SAMPLES_FORMAT
from pipeline.errors import InputError
from pipeline.generation import ledger, npz, writers
from pipeline.generation.chunks import Chunk, file_name
from pipeline.generation.config import GenerateConfig
from pipeline.generation.ledger import ChunkRecord
from pipeline.generation.sampler import labels_or_none, sample_labels
from pipeline.markdown import plain, table
from pipeline.redact import one_line
from pipeline.stretches import open_file
from pipeline.versions import VERSIONS

SHEET, SHEET_COLUMNS, SHEET_ROWS = "contact-sheet.png", 16, 4
_LABELS_TOGETHER = 65_536
_TAR_BLOCK = 2**20
_OF_NPZ = (
    f"`{npz.ALL}` holds all of them in one file, as guided-diffusion's evaluator takes it: images as `{npz.IMAGES}`, "
    f"grey ones repeated into three channels, and labels, where there are any, as `{npz.LABELS}`.\n\n"
)


def describe(
    config: GenerateConfig,
    output: str,
    spec: ModelSpec,
    about: dict[str, Any],
    whole: dict[Chunk, ChunkRecord],
) -> None:
    """Writes all files beside the samples.

    Args:
        about: the settings, the model, and the name under which the model was requested.
        whole: records of all files, by chunk, in order.
    """
    if config.format == "png":
        data = png_metadata(config, spec, whole)
        storage.write_atomic(storage.join(output, ledger.DATA, ledger.PNG_METADATA), data)
    head = {
        "format": SAMPLES_FORMAT,
        "versions": VERSIONS,
        "code": {"ray-ddpm": __version__, "commit": _commit(), "torch": torch.__version__},
        **about,
        "arithmetic": sorted({record.arithmetic for record in whole.values()} - {""}),
        "trained_on": spec.provenance,
        **totals(whole),
    }
    if config.format == "npz":
        head[npz.ENTRY] = npz.write_all(output, whole, head["sha256"])
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
    # One file a line, without a list of them all in memory, because there may be a hundred thousand.
    manifest = json.dumps(head, indent=1)[:-2] + ',\n "files": [\n  ' + ",\n  ".join(files) + "\n ]\n}\n"
    storage.write_atomic(storage.join(output, MANIFEST), manifest.encode())
    images = first_images(output, config.format, list(whole), SHEET_COLUMNS * SHEET_ROWS, spec.image)
    storage.write_atomic(storage.join(output, SHEET), _sheet(images))
    storage.write_atomic(storage.join(output, CARD), card(head, spec, config).encode())


def totals(whole: dict[Chunk, ChunkRecord]) -> dict[str, Any]:
    """The manifest's figures for all files together."""
    return {
        "count": sum(record.rows for record in whole.values()),
        "bytes": sum(record.bytes for record in whole.values()),
        "blank": sum(record.blank for record in whole.values()),
        "nonfinite": sum(record.nonfinite for record in whole.values()),
        # Hash of the files' hashes, in order: one value by which two datasets can be compared.
        "sha256": hashlib.sha256("".join(record.sha256 for record in whole.values()).encode()).hexdigest(),
    }


def card(manifest: dict[str, Any], spec: ModelSpec, config: GenerateConfig, growing: str = "") -> str:
    """The README.md: front matter for `datasets.load_dataset`, text, and the metrics of evaluations if there are any.

    Args:
        growing: random text if files are being added; the card then gives no sizes.
    """
    files = {
        "parquet": ["data/train-*.parquet"],
        "webdataset": ["data/train-*.tar"],
        "png": ["data/**/*.png", "data/metadata.parquet"],
        "npz": [],  # `datasets` does not read npz
    }[config.format]
    size, classes, settings = spec.image.size, spec.image.classes, dict(manifest["settings"])
    columns = {name: str(kind) for name, kind in writers.columns_beside(config.seed).items()}
    # Readers of tars make columns of their own, and `datasets` has no reader of npz files.
    described = config.format not in ("webdataset", "npz")
    matter = front_matter(
        growing or manifest["sha256"],
        classes,
        columns,
        {"train": files} if files else {},
        {} if growing else {"train": SplitSize(manifest["count"], manifest["bytes"])},
        ("synthetic", "ddpm"),
        described,
    )
    labels = [f"{number} ({classes[number]})" for number in settings["labels"]]
    shown = settings | {"labels": ", ".join(labels) or "all" if spec.model.class_conditional else "none"}
    names = ", ".join(f"{number} {name}" for number, name in enumerate(classes))
    return (
        f"{matter}\n# {manifest['count']:,} generated images of {size}x{size} pixels\n\n"
        f"![The first of them]({SHEET})\n\n"
        f"Sampled by ray-ddpm {plain(manifest['code']['ray-ddpm'])} from {plain(manifest['model'])}. Sample *i* is a "
        "function of the settings below and of *i*; checksums are in manifest.json.\n\n"
        + (_OF_NPZ if config.format == "npz" else "")
        + (f"Classes: {plain(names)}.\n\n" if classes else "")
        + f"{table('generation', shown)}\n{table('the model was trained on', manifest['trained_on'])}"
        + ("" if growing else figures.section(config.output, manifest["sha256"]))
    )


def mark_growing(output: str, spec: ModelSpec, config: GenerateConfig) -> None:
    """Removes the sizes from a finished dataset's card before files are added to the dataset."""
    uri = storage.join(output, MANIFEST)
    if storage.exists(uri):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # rewritten at the end
            text = card(json.loads(storage.read_bytes(uri)), spec, config, f"growing {uuid.uuid4().hex}")
            storage.write_atomic(storage.join(output, CARD), text.encode())


def first_images(
    output: str, form: str, chunks: list[Chunk], count: int, image: ImageConfig
) -> list[np.ndarray]:
    """The first samples of a dataset, at most `count`: uint8 [H, W, C] each.

    Args:
        form: format of the dataset.
        chunks: its files, in order.

    Raises:
        InputError: a file is damaged although its length is right.
    """
    try:
        encoded = islice(_encoded_images(output, form, chunks, count), count)
        return [decode(data, image.size, image.channels) for data in encoded]
    except (DecodeError, pa.ArrowInvalid, tarfile.TarError) as error:
        raise InputError(
            f"--output {output}: a file is damaged ({one_line(error, 100)}): run with --verify to "
            "list the damaged files, remove them, then run the same command again"
        ) from None


def _encoded_images(output: str, form: str, chunks: list[Chunk], count: int) -> Iterator[bytes]:
    if form == "png":
        uris = sorted(storage.sizes(storage.join(output, ledger.DATA)), key=posixpath.basename)
        yield from (storage.read_bytes(uri) for uri in uris if uri.endswith(".png"))
        return
    if form == "npz":
        for chunk in chunks:
            pixels, _ = npz.read_archive(storage.join(output, ledger.DATA, file_name(chunk, form)))
            yield from map(encode_png, pixels[:count])
        return
    for chunk in chunks:
        with open_file(
            storage.join(output, ledger.DATA, file_name(chunk, writers.SUFFIX[form])),
            ahead=0 if form == "parquet" else _TAR_BLOCK,
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
    """The images [H, W, C] arranged in a grid, as PNG."""
    height, width, channels = images[0].shape
    columns = min(SHEET_COLUMNS, len(images))
    canvas = np.full((-(-len(images) // columns) * height, columns * width, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        canvas[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    Image.fromarray(canvas[..., 0] if channels == 1 else canvas).save(buffer, "PNG")
    return buffer.getvalue()


def png_metadata(config: GenerateConfig, spec: ModelSpec, whole: dict[Chunk, ChunkRecord]) -> bytes:
    """The metadata table of a folder of PNGs. Label, index and seed are computed, so no image is read."""
    buffer, classes = io.BytesIO(), spec.image.classes
    with pq.ParquetWriter(buffer, writers.png_metadata([], [], config.seed, classes).schema) as writer:
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
    """The git commit of the code; None if it does not run from a checkout."""
    root = checkout()
    if not root or not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
