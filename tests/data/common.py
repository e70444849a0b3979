"""Small sources of every kind, made of the same random images."""

import contextlib
import gzip
import io
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("cat", "dog", "owl")
NUMBERS = ("0", "1", "2")


def picture(seed: int, width: int = 12, height: int = 12, mode: str = "RGB") -> Image.Image:
    """Return a smooth random image. It survives JPEG, and damage to its bytes changes its pixels."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encoded(count: int, width: int = 12, height: int = 12, kind: str = "PNG") -> list[bytes]:
    return [encode(picture(i, width, height), kind) for i in range(count)]


def label_of(number: int) -> int:
    return number % len(CLASSES)


def write_folder(root: Path, images: list[bytes], suffix: str = "png") -> Path:
    """Write the images as a tree with one folder per class, and return its root."""
    for i, data in enumerate(images):
        folder = root / CLASSES[label_of(i)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:04d}.{suffix}").write_bytes(data)
    return root


def tar_bytes(
    images: list[bytes], first: int = 0, suffix: str = "png", names: Sequence[str] = NUMBERS
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i, data in enumerate(images, first):
            for name, content in ((f"{i:04d}.{suffix}", data), (f"{i:04d}.cls", names[label_of(i)].encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_tars(root: Path, images: list[bytes], per_tar: int = 100, names: Sequence[str] = NUMBERS) -> Path:
    root.mkdir(parents=True)
    for first in range(0, len(images), per_tar):
        content = tar_bytes(images[first : first + per_tar], first, names=names)
        (root / f"{first:06d}.tar").write_bytes(content)
    return root


def write_parquet(root: Path, images: list[bytes], rows_per_group: int = 25, files: int = 2) -> Path:
    """Write the images as Parquet files with Hugging Face's `datasets`, which defines the convention."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    root.mkdir(parents=True, exist_ok=True)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(CLASSES))})
    for number, rows in enumerate(np.array_split(np.arange(len(images)), files)):
        content = {
            "image": [{"bytes": images[i], "path": f"{i:04d}.png"} for i in rows],
            "label": [label_of(int(i)) for i in rows],
        }
        dataset = Dataset.from_dict(content, features=features)
        table = dataset.data.table.replace_schema_metadata(dataset.features.arrow_schema.metadata)
        pq.write_table(table, root / f"train-{number}.parquet", row_group_size=rows_per_group)
    return root


def plain_parquet(path: Path, images: list[bytes], labels: pa.Array) -> None:
    pq.write_table(pa.table({"image": pa.array(images, pa.binary()), "label": labels}), path)


def write_idx(root: Path, pixels: np.ndarray, labels: np.ndarray) -> Path:
    """Write uint8 images [N, S, S] and their labels as a pair of gzipped IDX files, like MNIST's."""
    root.mkdir(parents=True)
    count, size, _ = pixels.shape
    header = b"".join(n.to_bytes(4, "big") for n in (2051, count, size, size))
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    header = b"".join(n.to_bytes(4, "big") for n in (2049, count))
    (root / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(header + labels.astype(np.uint8).tobytes())
    )
    return root


@contextlib.contextmanager
def sent_by_value(module: str) -> Iterator[None]:
    """Send a test module's classes to Ray's workers by value. Each worker would import the module, for seconds."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[module])
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[module])


def leave_ray() -> None:
    """Shut Ray down once no thread uses it any more.

    After a stream is closed early, Ray Data's threads call Ray once more. That call would end a process without Ray.
    """
    import ray  # not at the top: most importers need only the images

    end = time.monotonic() + 30
    while any(t.name == "iter_threaded" for t in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.1)
    ray.shutdown()
