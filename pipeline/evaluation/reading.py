"""Images by sample id, from a prepared dataset or from a generated one."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import storage
from pipeline.config import ImageConfig
from pipeline.data.generated import files_of, read_manifest
from pipeline.data.groups import Group, read_rows, row_groups
from pipeline.data.images import DecodeError, decode
from pipeline.data.index import DatasetIndex
from pipeline.data.sources.fetch import in_order
from pipeline.data.sources.parquet import row_counts
from pipeline.errors import InputError


def read_images(index: DatasetIndex, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """The images of ascending sample ids.

    Returns:
        uint8 [N, C, H, W], and labels, int64 [N], -1 for none.

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
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def image_names(index: DatasetIndex, ids: np.ndarray) -> list[str]:
    """The files and paths of the images of ascending sample ids, for messages."""
    return [
        f"{group.part.uri}: image {path.as_py()}"
        for group, table in _tables(index, ids)
        for path in table["path"]
    ]


def _tables(index: DatasetIndex, ids: np.ndarray) -> Iterator[tuple[Group, pa.Table]]:
    """The rows of ascending sample ids, by the groups that hold them."""
    ends = index.first[1:]
    owners = np.searchsorted(ends, ids, side="right")
    for number in np.unique(owners):
        group = index.groups[number]
        yield group, read_rows(group, ids[owners == number] - (ends[number] - group.rows))


def open_samples(uri: str, image: ImageConfig, model: str = "") -> DatasetIndex:
    """A folder of Parquet files with the columns `image` (struct of bytes and path) and `label`.

    Of a folder that jobs/generate.py wrote the files are those of its manifest.

    Args:
        image: what the images are compared with; they are brought to its size and channels.
        model: fingerprint of the model that must have made them; "" = any.

    Raises:
        InputError: no such folder, no Parquet file in it, one that is damaged, other columns, or another model's.
    """
    uri = storage.absolute(uri)
    manifest = read_manifest(uri, "--samples")
    if manifest is None:
        files = storage.list_files(uri, (".parquet",))
    else:
        if model not in ("", manifest["settings"]["model_fingerprint"]):
            raise InputError(
                f"--samples {uri}: made by another model than --model: by {manifest['model']}: name that one, or "
                "generate anew"
            )
        files = [file for file in files_of(uri, manifest, "--samples") if file.endswith(".parquet")]
    if not files:
        raise InputError(f"--samples {uri}: no Parquet files there: generate with --format parquet")
    groups = row_groups(zip(files, in_order(row_counts, files, uri), strict=True))
    if not groups.first[-1]:
        raise InputError(f"--samples {uri}: the Parquet files there are empty")
    return DatasetIndex(uri, "samples", image, groups, fingerprint="")
