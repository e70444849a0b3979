"""Reads images by sample id, from a prepared or a generated dataset."""

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import storage
from pipeline.config import ImageConfig
from pipeline.data.generated import files_of, read_manifest
from pipeline.data.groups import Group, Groups, pack, read_rows, row_groups
from pipeline.data.images import DecodeError, decode
from pipeline.data.index import DatasetIndex
from pipeline.data.labels import is_number
from pipeline.data.sources.fetch import in_order
from pipeline.data.sources.npz import list_npz
from pipeline.data.sources.parquet import class_names, row_counts
from pipeline.data.sources.parts import Request
from pipeline.data.sources.records import ArrayPart
from pipeline.data.sources.tree import open_tree
from pipeline.errors import InputError

FORMATS = (".parquet", ".npz")
IMAGES_PER_PART = 1024


def read_images(index: DatasetIndex, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """The images with these sample ids, which must be ascending.

    Returns:
        images, uint8 [N, C, H, W], and labels, int64 [N], -1 for none and for a number that is none of the classes.

    Raises:
        InputError: an image can't be decoded.
    """
    image, pixels, labels = index.image, list[np.ndarray](), list[int]()
    for group, table in _tables(index, ids):
        labels += table["label"].to_pylist()
        for data, path in zip(table["bytes"], table["path"], strict=True):
            try:
                pixels.append(decode(data.as_py(), image.size, image.channels))
            except DecodeError as error:
                raise InputError(
                    f"{group.part.uri}: image {path.as_py()}: {error}: leave it out of the data"
                ) from None
    known = [label if label < len(image.classes) else -1 for label in labels]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(known)


def image_names(index: DatasetIndex, ids: np.ndarray) -> list[str]:
    """Files and paths of the images with these ascending sample ids, for messages."""
    return [
        f"{group.part.uri}: image {path.as_py()}"
        for group, table in _tables(index, ids)
        for path in table["path"]
    ]


def _tables(index: DatasetIndex, ids: np.ndarray) -> Iterator[tuple[Group, pa.Table]]:
    """The rows with these ascending sample ids, group by group."""
    ends = index.first[1:]
    owners = np.searchsorted(ends, ids, side="right")
    for number in np.unique(owners):
        group = index.groups[number]
        yield group, read_rows(group, ids[owners == number] - (ends[number] - group.rows))


def open_samples(uri: str, image: ImageConfig, model: str = "") -> DatasetIndex:
    """Opens samples: Parquet files with columns `image` (struct of bytes and path) and `label`, or npz files.

    In a folder that jobs/generate.py wrote, only the files of the manifest are used. Labels of a Parquet file that
    names other classes than the images have are not used, because their numbers mean something else.

    Args:
        image: images that the samples are compared with; samples are converted to their size and channels.
        model: fingerprint of the model that must have made the samples; "" = any model.

    Raises:
        InputError: the folder or the files are missing, damaged or empty, have other columns, or come from another
            model.
    """
    uri = storage.absolute(uri)
    manifest, fingerprint = read_manifest(uri, "--samples"), ""
    if manifest is None:
        files = storage.list_files(uri, FORMATS)
    else:
        fingerprint = str(manifest.get("sha256", ""))
        if model not in ("", manifest["settings"]["model_fingerprint"]):
            raise InputError(
                f"--samples {uri}: made by {manifest['model']}, not by --model: give that model, or "
                "generate new samples"
            )
        files = storage.with_suffix(files_of(uri, manifest, "--samples"), *FORMATS)
    tables = storage.with_suffix(files, FORMATS[0])
    if not files:
        raise InputError(
            f"--samples {uri}: no Parquet or npz files there: generate with --format parquet, or npz"
        )
    if tables:
        groups: Groups = row_groups(zip(tables, in_order(row_counts, tables, uri), strict=True))
        if (names := class_names(tables[0])) and names != image.classes:
            image = replace(image, classes=())
    else:
        groups = _arrays(files)
    if not groups.first[-1]:
        raise InputError(f"--samples {uri}: the files there are empty")
    return DatasetIndex(uri, "samples", image, groups, fingerprint)


def _arrays(files: list[str]) -> Groups:
    """The images of npz files, with labels as class numbers.

    Raises:
        InputError: a file is damaged or holds no images, or its labels are not class numbers.
    """
    groups = list[Group]()
    for uri in files:
        listing = list_npz(open_tree(uri), Request(IMAGES_PER_PART))
        for why in (*listing.bad.values(), *(() if listing.parts else listing.ignored.values())):
            raise InputError(f"--samples {uri}: {why}")
        for part in cast(tuple[ArrayPart, ...], listing.parts):
            if part.faults or not all(label is None or is_number(label) for label in part.labels):
                raise InputError(f"--samples {uri}: its labels are not class numbers")
            labels = np.array([-1 if label is None else int(label) for label in part.labels], np.int64)
            groups.append(Group(part, len(labels), np.arange(len(labels)), labels))
    return pack(groups) if groups else row_groups(())
