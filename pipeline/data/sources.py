"""What jobs/prepare.py reads: digits, IDX files, a folder tree, WebDataset tars, Hugging Face Parquet.

A source is cut into parts, small descriptions that any node can read alone, in an order that does not depend
on the machine.
"""

import gzip
import hashlib
import json
import posixpath
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.data import storage
from pipeline.data.images import encode_png
from pipeline.data.parquet import open_parquet
from pipeline.errors import InputError

Source = Literal["digits", "idx", "folder", "webdataset", "huggingface"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_IDX_IMAGES, _IDX_LABELS = 2051, 2049


class Item(NamedTuple):
    """One image as it was found; `label` is a class name, or None."""

    path: str
    data: bytes
    label: str | None


@dataclass(frozen=True)
class Part:
    """A piece of a source.

    Attributes:
        uris: the files of this part.
        start, count: which of the images or row groups in them, where that needs saying.
        classes: names of integer labels, where the source has them.
    """

    source: Source
    uris: tuple[str, ...] = ()
    start: int = 0
    count: int = 0
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A source cut into parts.

    Attributes:
        size, channels: of the source's own images, or 0 where they vary.
        classes: of labels, in order; empty where they are only known after reading (WebDataset) or absent.
    """

    parts: tuple[Part, ...]
    size: int = 0
    channels: int = 0
    classes: tuple[str, ...] = ()


def plan(source: Source, uri: str, images_per_part: int) -> Plan:
    """Cuts a source into parts of about `images_per_part` images.

    Raises:
        InputError: nothing of that kind is there.
    """
    if source == "digits":
        return Plan((Part("digits"),), 8, 1, tuple(map(str, range(10))))
    if not uri:
        raise InputError(f"--source {source} needs --input")
    uri = storage.absolute(uri)
    makers = {
        "idx": _plan_idx,
        "folder": _plan_folder,
        "webdataset": _plan_tars,
        "huggingface": _plan_parquet,
    }
    return makers[source](uri, images_per_part)


def read_part(part: Part) -> Iterator[Item]:
    """The images of a part, in order; an image that is damaged is still an item, with the bytes there are."""
    readers = {
        "digits": _read_digits,
        "idx": _read_idx,
        "folder": _read_folder,
        "webdataset": _read_tar,
        "huggingface": _read_parquet,
    }
    return readers[part.source](part)


def _read_digits(part: Part) -> Iterator[Item]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        pixels = np.minimum(np.round(image * (255 / 16)), 255).astype(np.uint8)[..., None]
        yield Item(f"digits/{i:04d}.png", encode_png(pixels), str(label))


def _open_idx(uri: str) -> bytes:
    data = storage.read_bytes(uri)
    try:
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise InputError(f"{uri}: damaged gzip file: {error}") from None


def _idx_header(uri: str) -> tuple[int, int, int, int]:
    """Magic number, count, rows, columns."""
    data = _open_idx(uri)
    if len(data) < 16:
        raise InputError(f"{uri}: not an IDX file")
    magic, count, rows, columns = struct.unpack(">IIII", data[:16])
    if magic == _IDX_IMAGES and len(data) != 16 + count * rows * columns:
        raise InputError(f"{uri}: cut short: {len(data)} bytes, {16 + count * rows * columns} expected")
    return magic, count, rows, columns


def _plan_idx(uri: str, images_per_part: int) -> Plan:
    files = storage.list_files(uri)
    images = [f for f in files if "images" in posixpath.basename(f) and "idx3" in posixpath.basename(f)]
    if not images:
        raise InputError(f"--input {uri}: no IDX image files (…-images-idx3-ubyte, gzipped or not)")
    parts, size, classes = list[Part](), 0, set[int]()
    for file in images:
        magic, count, rows, columns = _idx_header(file)
        if magic != _IDX_IMAGES or rows != columns:
            raise InputError(f"{file}: not an IDX file of square images")
        labels = file.replace("images", "labels").replace("idx3", "idx1")
        pair = (file, labels) if labels in files else (file,)
        if len(pair) == 2:
            classes |= set(_open_idx(labels)[8:])
        size = max(size, rows)
        parts += [
            Part("idx", pair, start, min(images_per_part, count - start))
            for start in range(0, count, images_per_part)
        ]
    names = tuple(str(c) for c in range(max(classes) + 1)) if classes else ()
    return Plan(tuple(parts), size, 1, names)


def _read_idx(part: Part) -> Iterator[Item]:
    data = _open_idx(part.uris[0])
    _, _, rows, columns = struct.unpack(">IIII", data[:16])
    first = 16 + part.start * rows * columns
    pixels = np.frombuffer(data, np.uint8, part.count * rows * columns, first).reshape(-1, rows, columns, 1)
    labels = (
        _open_idx(part.uris[1])[8:][part.start : part.start + part.count] if len(part.uris) == 2 else None
    )
    name = posixpath.basename(part.uris[0])
    for i, image in enumerate(pixels):
        yield Item(
            f"{name}/{part.start + i:06d}.png", encode_png(image), None if labels is None else str(labels[i])
        )


def _plan_folder(uri: str, images_per_part: int) -> Plan:
    files = storage.list_files(uri, IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"--input {uri}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    parents = {file: posixpath.relpath(posixpath.dirname(file), _root(uri)) for file in files}
    classes = sorted({parent for parent in parents.values() if parent != "."})
    # A tree lists one class after the other: mixed by a hash of the name, so that every shard has them all.
    files.sort(key=lambda file: hashlib.sha256(posixpath.relpath(file, _root(uri)).encode()).digest())
    parts = [
        Part("folder", tuple(files[i : i + images_per_part]), classes=(_root(uri),))
        for i in range(0, len(files), images_per_part)
    ]
    return Plan(tuple(parts), classes=tuple(classes))


def _root(uri: str) -> str:
    fs, path = storage.open_fs(uri)
    return path if storage.absolute(uri) == path else str(fs.unstrip_protocol(path))


def _read_folder(part: Part) -> Iterator[Item]:
    (root,) = part.classes
    for uri in part.uris:
        name = posixpath.relpath(uri, root)
        parent = posixpath.dirname(name)
        try:
            data = storage.read_bytes(uri)
        except OSError:
            data = b""
        yield Item(name, data, parent or None)


def _plan_tars(uri: str, images_per_part: int) -> Plan:
    files = storage.list_files(uri, (".tar",))
    if not files:
        raise InputError(f"--input {uri}: no .tar files in it")
    return Plan(tuple(Part("webdataset", (file,)) for file in files))


def _read_tar(part: Part) -> Iterator[Item]:
    """Groups members by key, the name up to the first dot, as WebDataset does. Nothing is unpacked to disk."""
    (uri,) = part.uris
    fs, path = storage.open_fs(uri)
    tar_name, key, found = posixpath.basename(uri), "", dict[str, bytes]()
    try:
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                name = f"{folder}/{stem}" if folder else stem
                if name != key:
                    yield from _tar_item(tar_name, key, found)
                    key, found = name, {}
                content = tar.extractfile(member)
                found[suffix.lower()] = content.read() if content is not None else b""
    except (tarfile.TarError, EOFError, OSError) as error:
        yield from _tar_item(tar_name, key, found)
        yield Item(f"{tar_name}: damaged after {key or 'its beginning'} ({type(error).__name__})", b"", None)
        return
    yield from _tar_item(tar_name, key, found)


def _tar_item(tar_name: str, key: str, found: dict[str, bytes]) -> Iterator[Item]:
    for suffix, data in found.items():
        if f".{suffix}" in IMAGE_SUFFIXES:
            label = found.get("cls", b"").decode(errors="replace").strip() or None
            if label is None and "json" in found:
                try:
                    value = json.loads(found["json"])
                    label = str(value["label"]) if isinstance(value, dict) and "label" in value else None
                except ValueError:
                    label = None
            # The name is kept as text only; a member's path leads nowhere.
            yield Item(f"{tar_name}/{key.lstrip('/').replace('..', '_')}.{suffix}", data, label)
            return


def _plan_parquet(uri: str, images_per_part: int) -> Plan:
    parts, classes = list[Part](), tuple[str, ...]()
    for file in storage.list_files(uri, (".parquet",)):
        fs, path = storage.open_fs(file)
        try:
            with fs.open(path, "rb") as handle:
                parquet = open_parquet(handle, file)
                schema, groups = parquet.schema_arrow, parquet.num_row_groups
                rows = [parquet.metadata.row_group(i).num_rows for i in range(groups)]
        except InputError:
            raise
        except Exception as error:  # pyarrow raises anything on a damaged footer
            raise InputError(f"{file}: not a Parquet file: {' '.join(str(error).split())[:200]}") from None
        if "image" not in schema.names:
            raise InputError(f"{file}: no column `image`; it has {', '.join(schema.names)}")
        classes = classes or _class_names(schema.metadata)
        start = 0
        while start < groups:
            count, images = 0, 0
            while start + count < groups and (not count or images + rows[start + count] <= images_per_part):
                images += rows[start + count]
                count += 1
            parts.append(Part("huggingface", (file,), start, count, classes))
            start += count
    if not parts:
        raise InputError(f"--input {uri}: no .parquet files with images in it")
    return Plan(tuple(parts), classes=classes)


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    try:
        features: dict[str, Any] = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return ()


def _read_parquet(part: Part) -> Iterator[Item]:
    (uri,) = part.uris
    fs, path = storage.open_fs(uri)
    with fs.open(path, "rb") as handle:
        parquet = open_parquet(handle, uri)
        columns = [name for name in ("image", "label") if name in parquet.schema_arrow.names]
        for group in range(part.start, part.start + part.count):
            try:
                rows = parquet.read_row_group(group, columns=columns).to_pylist()
            except Exception as error:  # a damaged page; the other row groups are still good
                yield Item(f"{posixpath.basename(uri)}/{group}: {type(error).__name__}", b"", None)
                continue
            for i, row in enumerate(rows):
                image = row["image"] or {}
                data = image.get("bytes") if isinstance(image, dict) else image
                label = row.get("label")
                if isinstance(label, int) and 0 <= label < len(part.classes):
                    label = part.classes[label]
                name = (image.get("path") if isinstance(image, dict) else None) or f"{i:06d}"
                yield Item(
                    f"{posixpath.basename(uri)}/{group}/{name}",
                    data or b"",
                    None if label is None else str(label),
                )
