"""Images by sample id, from a prepared dataset or from a generated one."""

import numpy as np
import torch
from torch import Tensor

from pipeline import storage
from pipeline.config import ImageConfig
from pipeline.data.groups import read_rows, row_groups
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
    ends = index.first[1:]
    owners = np.searchsorted(ends, ids, side="right")
    for number in np.unique(owners):
        group = index.groups[number]
        table = read_rows(group, ids[owners == number] - (ends[number] - group.rows))
        labels += table["label"].to_pylist()
        for data, path in zip(table["bytes"], table["path"], strict=True):
            try:
                pixels.append(decode(data.as_py(), image.size, image.channels))
            except DecodeError as error:
                raise InputError(
                    f"{group.part.uri}: image {path.as_py()}: {error}: leave it out of the data"
                ) from None
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def open_samples(uri: str, image: ImageConfig) -> DatasetIndex:
    """A folder of Parquet files with the columns `image` (struct of bytes and path) and `label`.

    Args:
        image: what the images are compared with; they are brought to its size and channels.

    Raises:
        InputError: no such folder, no Parquet file in it, one that is damaged, or other columns.
    """
    files = storage.list_files(storage.absolute(uri), (".parquet",))
    if not files:
        raise InputError(f"--samples {uri}: no Parquet files there: generate with --format parquet")
    groups = row_groups(zip(files, in_order(row_counts, files, uri), strict=True))
    if not groups.first[-1]:
        raise InputError(f"--samples {uri}: the Parquet files there are empty")
    return DatasetIndex(uri, "samples", image, groups, fingerprint="")
