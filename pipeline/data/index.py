"""A dataset as training sees it: groups of rows that can be read alone, and what they hold."""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.config import ImageConfig
from pipeline.data.labels import class_numbers
from pipeline.data.manifest import FORMAT, MANIFEST, SAMPLES, SAMPLES_FORMAT, SPLITS, UNFINISHED
from pipeline.data.scan import scan
from pipeline.data.sources.parquet import ParquetPart
from pipeline.data.sources.parts import Part
from pipeline.errors import InputError
from pipeline.versions import check_readable

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
        quarantined: images that are left out: damaged ones of prepared data, those of no known class of raw data.
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
    return Group(ParquetPart(uri, number, 1), rows)


@dataclass(frozen=True)
class Splits:
    """A dataset, opened once: `splits["train"]` is the index of a split.

    Attributes:
        indexes: of the splits that hold images, by name.
    """

    uri: str
    indexes: dict[str, DatasetIndex]

    def __getitem__(self, name: str) -> DatasetIndex:
        """One split.

        Raises:
            InputError: there is none of that name, or it holds no images.
        """
        if name not in self.indexes:
            raise InputError(
                f"--data {self.uri}: has no images in a split {name!r}; it has {', '.join(self.indexes)}"
            )
        return self.indexes[name]

    def __contains__(self, name: str) -> bool:
        return name in self.indexes


def open_dataset(uri: str, split: str = "train", image_size: int = 0) -> DatasetIndex:
    """One split of a dataset; see `open_splits`, which opens all of them for the price of one.

    Raises:
        InputError: see `open_splits`; no such split, or no images in it.
    """
    return open_splits(uri, image_size)[split]


def open_splits(uri: str, image_size: int = 0) -> Splits:
    """Opens what jobs/prepare.py or jobs/generate.py wrote, or any of the formats that the former reads.

    Images that were not prepared are read once, here, undecoded: for their hashes, by which a tenth of them is held
    out, their labels and their sizes.

    Args:
        image_size: to bring the images to; 0 = their own.

    Raises:
        InputError: no such folder, or nothing in it that could be read.
    """
    uri = storage.absolute(uri)
    if not storage.exists(uri, pattern=True):
        raise InputError(f"--data {uri}: no such folder")
    if storage.exists(storage.join(uri, MANIFEST)):
        return _open_prepared(uri, image_size)
    if storage.exists(storage.join(uri, UNFINISHED)):
        raise InputError(f"--data {uri}: jobs/prepare.py has not finished it: run that again, it goes on")
    return _open_source(uri, image_size)


def _open_prepared(uri: str, image_size: int) -> Splits:
    try:
        manifest = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
        check_readable(manifest.get("versions"), f"--data {uri}")
        if manifest["format"] == SAMPLES_FORMAT:
            return _open_source(storage.join(uri, SAMPLES), image_size)
        if manifest["format"] != FORMAT:
            raise InputError(f"--data {uri}: {MANIFEST} is not one of jobs/prepare.py or jobs/generate.py")
        stored = manifest["image"]
        image = ImageConfig(image_size or stored["size"], stored["channels"], tuple(stored["classes"]))
        indexes = {
            name: DatasetIndex(
                uri=uri,
                split=name,
                image=image,
                groups=tuple(
                    row_group(storage.join(uri, shard["file"]), number, rows)
                    for shard in split["shards"]
                    for number, rows in enumerate(shard["row_groups"])
                ),
                fingerprint=manifest["fingerprint"],
                quarantined=manifest["quarantined"],
            )
            for name, split in manifest["splits"].items()
            if split["rows"]
        }
        return Splits(uri, indexes)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"--data {uri}: damaged {MANIFEST} ({type(error).__name__}: {error})") from None


def _open_source(uri: str, image_size: int) -> Splits:
    found = scan(uri)
    size = image_size or found.size
    if not size:
        raise InputError(f"--data {uri}: its images are not squares of one size: give --image-size")
    image = ImageConfig(size, found.channels, found.classes)
    number_of, unusable = class_numbers(found.classes), 0
    groups: dict[str, list[Group]] = {name: [] for name in SPLITS}
    for part in found.parts:
        labels: dict[str, dict[int, int]] = {name: {} for name in SPLITS}  # by place in the part
        for place, (digest, label) in enumerate(zip(part.digests, part.labels, strict=True)):
            if (number := number_of(label)) is None:
                unusable += 1
            else:
                labels[SPLITS[held_out(digest, VALIDATION_FRACTION)]][place] = number
        for name, mine in labels.items():
            if mine:
                kept = None if len(mine) == len(part.digests) else tuple(mine)
                groups[name].append(Group(part.part, len(mine), kept, tuple(mine.values())))
    indexes = {
        name: DatasetIndex(uri, name, image, tuple(some), found.fingerprint, unusable)
        for name, some in groups.items()
        if some
    }
    return Splits(uri, indexes)


def read_rows(group: Group, rows: np.ndarray) -> pa.Table:
    """Rows of one group, still encoded.

    Args:
        rows: int [N], positions in the group, in any order.

    Returns:
        columns bytes (binary), label (int64, -1 for none) and path (string), in the order asked for.
    """
    table = group.part.table(rows if group.kept is None else np.asarray(group.kept)[rows])
    if group.labels is not None:
        table = table.set_column(1, "label", pa.array(np.asarray(group.labels, np.int64)[rows]))
    return table
