"""A dataset as training sees it: groups of rows that can be read alone, and what they hold."""

import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ImageConfig
from pipeline.data import storage
from pipeline.data.parquet import open_parquet
from pipeline.errors import InputError

MANIFEST = "manifest.json"
FORMAT = "ray-ddpm-shards"


@dataclass(frozen=True)
class Group:
    """Rows that are read together: row group `number` of a Parquet file; the unit of shuffling."""

    uri: str
    number: int
    rows: int


@dataclass(frozen=True)
class DatasetIndex:
    """One split of a dataset.

    Attributes:
        groups: in the dataset's own order; sample id = rows of all groups before + row in the group.
        fingerprint: of the content, the same however it is cut into shards.
        mean, std: per channel, of pixels in [0, 1].
    """

    uri: str
    split: str
    image: ImageConfig
    groups: tuple[Group, ...]
    fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def rows(self) -> int:
        """Images in this split."""
        return sum(group.rows for group in self.groups)


def open_dataset(uri: str, split: str = "train") -> DatasetIndex:
    """Opens what jobs/prepare.py wrote.

    Raises:
        InputError: no such folder, an empty one, one without a manifest, or no such split in it.
    """
    uri = storage.absolute(uri)
    if not storage.exists(uri):
        raise InputError(f"--data {uri}: no such folder")
    if not storage.exists(storage.join(uri, MANIFEST)):
        what = "holds no prepared images" if storage.list_files(uri) else "is empty"
        raise InputError(f"--data {uri}: {what} (no {MANIFEST}): write shards with jobs/prepare.py first")
    try:
        manifest = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
        if manifest["format"] != FORMAT:
            raise InputError(f"--data {uri}: {MANIFEST} is not one of jobs/prepare.py")
        splits = manifest["splits"]
        if split not in splits or not splits[split]["rows"]:
            raise InputError(f"--data {uri}: has no images in a split {split!r}; it has {', '.join(splits)}")
        groups = [
            Group(storage.join(uri, shard["file"]), number, rows)
            for shard in splits[split]["shards"]
            for number, rows in enumerate(shard["row_groups"])
        ]
        image = manifest["image"]
        return DatasetIndex(
            uri=uri,
            split=split,
            image=ImageConfig(image["size"], image["channels"], tuple(image["classes"])),
            groups=tuple(groups),
            fingerprint=manifest["fingerprint"],
            mean=tuple(manifest["mean"]),
            std=tuple(manifest["std"]),
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"--data {uri}: damaged {MANIFEST} ({type(error).__name__}: {error})") from None


def read_rows(group: Group, rows: np.ndarray) -> pa.Table:
    """Rows of one group, still encoded.

    Args:
        rows: int [N], positions in the group, in any order.

    Returns:
        columns bytes (binary), label (int64, -1 for none) and path (string), in the order asked for.
    """
    table = _parquet(group.uri).read_row_group(group.number, columns=["image", "label"]).take(rows)
    image = table["image"].combine_chunks()
    return pa.table(
        {
            "bytes": image.field("bytes").cast(pa.binary()),
            "label": table["label"].fill_null(-1),
            "path": image.field("path"),
        }
    )


@lru_cache(maxsize=64)
def _parquet(uri: str) -> pq.ParquetFile:
    """An open shard: its footer is read once in a process, not once a group."""
    fs, path = storage.open_fs(uri)
    return open_parquet(fs.open(path, "rb"), uri)
