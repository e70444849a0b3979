"""A dataset as training sees it: groups of rows that can be read alone, and what they hold."""

import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.config import ImageConfig
from pipeline.data.manifest import FORMAT, MANIFEST, SAMPLES, SAMPLES_FORMAT, SPLITS, UNFINISHED
from pipeline.data.scan import Scan, scan
from pipeline.data.sources.parquet import read_row_group
from pipeline.data.sources.parts import Part, Source
from pipeline.data.sources.registry import find_source, read_part
from pipeline.errors import InputError

VALIDATION_FRACTION = 0.1


@dataclass(frozen=True)
class Group:
    """Rows that are read together, the unit of shuffling: a row group of Parquet, or a small part of another source.

    Attributes:
        kept: which rows of the part these are; None = all of them.
        labels: class numbers of these rows, -1 for none; None = what is written in the file.
    """

    part: Part
    rows: int
    kept: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class DatasetIndex:
    """One split of a dataset.

    Attributes:
        groups: in the dataset's own order; sample id = rows of all groups before + row in the group.
        fingerprint: of the content, the same however it is cut into files.
        quarantined: images that were left out when the data was prepared.
    """

    uri: str
    split: str
    image: ImageConfig
    groups: tuple[Group, ...]
    fingerprint: str
    quarantined: int = 0

    @property
    def rows(self) -> int:
        """Images in this split."""
        return sum(group.rows for group in self.groups)


def held_out(digest: bytes, fraction: float) -> bool:
    """Whether an image belongs to the validation split, by a hash of its content."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def row_group(uri: str, number: int, rows: int) -> Group:
    """All of one row group of a Parquet file."""
    return Group(Part("huggingface", (uri,), number, 1), rows)


def open_dataset(uri: str, split: str = "train", image_size: int = 0) -> DatasetIndex:
    """Opens what jobs/prepare.py or jobs/generate.py wrote, or any of the formats that the former reads.

    Images that were not prepared are read once, here, undecoded: for their hashes, by which a tenth of them is held
    out, their labels and their sizes.

    Args:
        image_size: to bring the images to; 0 = their own.

    Raises:
        InputError: no such folder, nothing in it that could be read, or no such split.
    """
    uri = storage.absolute(uri)
    if not storage.exists(uri):
        raise InputError(f"--data {uri}: no such folder")
    if storage.exists(storage.join(uri, MANIFEST)):
        return _open_prepared(uri, split, image_size)
    if storage.exists(storage.join(uri, UNFINISHED)):
        raise InputError(f"--data {uri}: jobs/prepare.py has not finished it: run that again, it goes on")
    return _open_source(uri, split, image_size)


def _open_prepared(uri: str, split: str, image_size: int) -> DatasetIndex:
    try:
        manifest = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
        if manifest["format"] == SAMPLES_FORMAT:
            return _open_source(storage.join(uri, SAMPLES), split, image_size)
        if manifest["format"] != FORMAT:
            raise InputError(f"--data {uri}: {MANIFEST} is not one of jobs/prepare.py or jobs/generate.py")
        splits = manifest["splits"]
        if split not in splits or not splits[split]["rows"]:
            raise InputError(f"--data {uri}: has no images in a split {split!r}; it has {', '.join(splits)}")
        image = manifest["image"]
        return DatasetIndex(
            uri=uri,
            split=split,
            image=ImageConfig(image_size or image["size"], image["channels"], tuple(image["classes"])),
            groups=tuple(
                row_group(storage.join(uri, shard["file"]), number, rows)
                for shard in splits[split]["shards"]
                for number, rows in enumerate(shard["row_groups"])
            ),
            fingerprint=manifest["fingerprint"],
            quarantined=manifest["quarantined"],
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"--data {uri}: damaged {MANIFEST} ({type(error).__name__}: {error})") from None


def _open_source(uri: str, split: str, image_size: int) -> DatasetIndex:
    if split not in SPLITS:
        raise InputError(f"--data {uri}: has no split {split!r}; it has {', '.join(SPLITS)}")
    source = find_source(uri)
    found = _scanned(source, uri, storage.signature(uri))
    size = image_size or found.size
    if not size:
        raise InputError(f"--data {uri}: its images are not squares of one size: give --image-size")
    numbers = {name: number for number, name in enumerate(found.classes)}
    groups = []
    for part in found.parts:
        wanted = [
            i for i, d in enumerate(part.digests) if held_out(d, VALIDATION_FRACTION) == (split != "train")
        ]
        if wanted:
            labels = tuple(numbers.get(part.labels[i] or "", -1) for i in wanted)
            kept = None if len(wanted) == len(part.digests) else tuple(wanted)
            groups.append(Group(part.part, len(wanted), kept, labels))
    if not groups:
        raise InputError(f"--data {uri}: has no images in a split {split!r}")
    return DatasetIndex(
        uri, split, ImageConfig(size, found.channels, found.classes), tuple(groups), found.fingerprint
    )


@lru_cache(maxsize=4)
def _scanned(source: Source, uri: str, signature: str) -> Scan:
    """A job opens its data several times; as long as no file changes, it is read through once."""
    return scan(source, uri)


def read_rows(group: Group, rows: np.ndarray) -> pa.Table:
    """Rows of one group, still encoded.

    Args:
        rows: int [N], positions in the group, in any order.

    Returns:
        columns bytes (binary), label (int64, -1 for none) and path (string), in the order asked for.
    """
    places = rows if group.kept is None else np.asarray(group.kept)[rows]
    if group.part.source == "huggingface":
        (uri,), first = group.part.uris, group.part.start
        numbers = range(first, first + group.part.count)
        table = pa.concat_tables([read_row_group(uri, number) for number in numbers]).take(places)
    else:
        items = list(read_part(group.part))
        chosen = [items[place] for place in places]
        table = pa.table(
            {
                "bytes": pa.array([item.data for item in chosen], pa.binary()),
                "label": pa.nulls(len(chosen)),
                "path": pa.array([item.path for item in chosen], pa.string()),
            }
        )
    if group.labels is not None:
        labels = pa.array(np.asarray(group.labels, np.int64)[rows])
    elif pa.types.is_integer(table["label"].type):
        labels = table["label"].cast(pa.int64()).fill_null(-1)
    else:
        labels = pa.array([-1] * len(rows), pa.int64())
    return table.set_column(table.schema.get_field_index("label"), "label", labels)
