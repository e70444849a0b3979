"""What the project reads: digits, IDX files, a folder tree, WebDataset tars, Hugging Face Parquet.

A source is cut into parts, small descriptions that any node can read alone, in an order that does not depend
on the machine.
"""

import gzip
import hashlib
import io
import json
import posixpath
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Literal, NamedTuple

import numpy as np

from pipeline.data import storage
from pipeline.data.images import encode_png
from pipeline.data.parquet import class_names, read_row_group, row_counts
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
        start, count: which of the images, row groups or (of a tar) bytes in them; a count of 0 is all.
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


def find_source(uri: str) -> Source:
    """What kind of source a folder is, by the names of its files.

    Raises:
        InputError: it is empty, or holds nothing that could be read.
    """
    names = [posixpath.basename(file).lower() for file in storage.list_files(uri)]
    if not names:
        raise InputError(f"--data {uri}: is empty: write shards with jobs/prepare.py first")
    suffixes = {posixpath.splitext(name)[1] for name in names}
    if ".parquet" in suffixes:
        return "huggingface"
    if ".tar" in suffixes:
        return "webdataset"
    if any(_is_idx(name) for name in names):
        return "idx"
    if suffixes & set(IMAGE_SUFFIXES):
        return "folder"
    raise InputError(f"--data {uri}: holds no prepared images, nor Parquet, tar, IDX or image files")


def split_part(part: Part, images: int) -> Iterator[Part]:
    """Cuts a part that is one whole tar into parts of so many images; the others are small from the start."""
    if part.source == "webdataset" and not part.count:
        return _split_tar(part, images)
    return iter((part,))


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


def _is_idx(name: str) -> bool:
    return "images" in name and "idx3" in name


@lru_cache(maxsize=2)
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
    images = [file for file in files if _is_idx(posixpath.basename(file))]
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
        except (FileNotFoundError, PermissionError):  # any other error is the storage's: not an image's fault
            data = b""
        yield Item(name, data, parent or None)


def _plan_tars(uri: str, images_per_part: int) -> Plan:
    files = storage.list_files(uri, (".tar",))
    if not files:
        raise InputError(f"--input {uri}: no .tar files in it")
    return Plan(tuple(Part("webdataset", (file,)) for file in files))


def _read_tar(part: Part) -> Iterator[Item]:
    (uri,) = part.uris
    fs, path = storage.open_fs(uri)
    size = part.count or int(fs.size(path))
    content = fs.cat_file(path, start=part.start, end=part.start + size) if part.count else None
    with fs.open(path, "rb") if content is None else io.BytesIO(content) as file:
        for _, item in _tar_samples(posixpath.basename(uri), file, size):
            yield item


def _split_tar(part: Part, images: int) -> Iterator[Part]:
    (uri,) = part.uris
    fs, path = storage.open_fs(uri)
    size, start, held = int(fs.size(path)), 0, 0
    with fs.open(path, "rb") as file:
        for offset, _ in _tar_samples(posixpath.basename(uri), file, size):
            if held >= images and start < offset < size:
                yield Part("webdataset", part.uris, start, offset - start)
                start, held = offset, 0
            held += 1
    if held:
        yield Part("webdataset", part.uris, start, size - start)


def _tar_samples(tar_name: str, file: IO[bytes], size: int) -> Iterator[tuple[int, Item]]:
    """Groups members by key, the name up to the first dot, as WebDataset does. Nothing is unpacked to disk.

    Returns:
        images, each with the byte at which the first member of its group begins; for damage, an item without bytes.
    """
    key, found, first = "", dict[str, bytes](), 0
    for begins, name, content in _tar_members(file, size):
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        its_key = f"{folder}/{stem}" if folder else stem
        if its_key != key:
            yield from ((first, item) for item in _tar_item(tar_name, key, found))
            key, found, first = its_key, {}, begins
        if content is None:
            yield begins, Item(f"{tar_name}: damaged at byte {begins}", b"", None)
        else:
            found[suffix.lower()] = content
    yield from ((first, item) for item in _tar_item(tar_name, key, found))


def _tar_members(file: IO[bytes], size: int) -> Iterator[tuple[int, str, bytes | None]]:
    """First byte, name and content of every file in a tar; no name and no content where bytes make no sense.

    tarfile ends without a word at the first damaged header: here it looks for the next good one.
    """
    here = 0
    while here < size:
        file.seek(here)
        try:
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep a note of every member
                    if _any_bytes(file, here, member.offset):
                        yield here, "", None
                    begins = member.offset
                    here = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if member.isfile():
                        if member.offset_data + member.size > size:
                            raise tarfile.ReadError("cut short")
                        content = tar.extractfile(member)
                        yield begins, member.name, content.read() if content is not None else b""
                if _any_bytes(file, here, size):
                    yield here, "", None
                return
        except Exception as error:  # tarfile raises anything on damaged headers
            if storage.is_storage_error(error):
                raise
            yield here, "", None
            here += tarfile.BLOCKSIZE


def _any_bytes(file: IO[bytes], start: int, stop: int) -> bool:
    """Whether there is anything but padding."""
    if start >= stop:
        return False
    place = file.tell()
    file.seek(start)
    found = any(file.read(min(2**20, stop - at)).strip(b"\0") for at in range(start, stop, 2**20))
    file.seek(place)
    return found


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
    parts, names = list[Part](), dict[str, tuple[str, ...]]()
    for file in storage.list_files(uri, (".parquet",)):
        rows = row_counts(file)
        names[file] = class_names(file)
        start = count = images = 0
        for group, more in enumerate([*rows, images_per_part]):
            if count and images + more > images_per_part:
                parts.append(Part("huggingface", (file,), start, count, names[file]))
                start, count, images = group, 0, 0
            count, images = count + 1, images + more
    if not parts:
        raise InputError(f"--input {uri}: no .parquet files with images in it")
    different = set(names.values())
    classes = different.pop() if len(different) == 1 else tuple(sorted(set[str]().union(*different)))
    return Plan(tuple(parts), classes=classes)


def _read_parquet(part: Part) -> Iterator[Item]:
    (uri,) = part.uris
    for group in range(part.start, part.start + part.count):
        table = read_row_group(uri, group)
        columns = (table[name].to_pylist() for name in ("bytes", "label", "path"))
        for data, label, name in zip(*columns, strict=True):
            if isinstance(label, int) and 0 <= label < len(part.classes):
                label = part.classes[label]
            path = f"{posixpath.basename(uri)}/{group}/{posixpath.basename(name)}"
            yield Item(path, data or b"", None if label is None else str(label))
