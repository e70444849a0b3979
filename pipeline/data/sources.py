"""What the project reads: digits, IDX files, a folder tree, WebDataset tars, Hugging Face Parquet.

A source is cut into parts, small descriptions that any node can read alone, in an order that does not depend
on the machine.
"""

import hashlib
import posixpath
from collections.abc import Iterator

import numpy as np

from pipeline.data import storage
from pipeline.data.idx import is_idx, plan_idx, read_idx
from pipeline.data.images import encode_png
from pipeline.data.parquet import class_names, read_row_group, row_counts
from pipeline.data.parts import IMAGE_SUFFIXES, Item, Part, Plan, Source
from pipeline.data.tars import plan_tars, read_tar, split_tar
from pipeline.errors import InputError

# What `datasets` calls an ImageFolder's table of other columns: the images are files.
BESIDE_IMAGES = "metadata.parquet"


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
        "idx": plan_idx,
        "folder": _plan_folder,
        "webdataset": plan_tars,
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
    suffixes = {posixpath.splitext(name)[1] for name in names if name != BESIDE_IMAGES}
    if ".parquet" in suffixes:
        return "huggingface"
    if ".tar" in suffixes:
        return "webdataset"
    if any(is_idx(name) for name in names):
        return "idx"
    if suffixes & set(IMAGE_SUFFIXES):
        return "folder"
    raise InputError(f"--data {uri}: holds no prepared images, nor Parquet, tar, IDX or image files")


def split_part(part: Part, images: int) -> Iterator[Part]:
    """Cuts a part that is one whole tar into parts of so many images; the others are small from the start."""
    if part.source == "webdataset" and not part.count:
        return split_tar(part, images)
    return iter((part,))


def read_part(part: Part) -> Iterator[Item]:
    """The images of a part, in order; an image that is damaged is still an item, with the bytes there are."""
    readers = {
        "digits": _read_digits,
        "idx": read_idx,
        "folder": _read_folder,
        "webdataset": read_tar,
        "huggingface": _read_parquet,
    }
    return readers[part.source](part)


def _read_digits(part: Part) -> Iterator[Item]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        pixels = np.minimum(np.round(image * (255 / 16)), 255).astype(np.uint8)[..., None]
        yield Item(f"digits/{i:04d}.png", encode_png(pixels), str(label))


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
