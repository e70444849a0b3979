"""A dataset as training sees it: groups of rows that can be read alone, and what they hold."""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.config import ImageConfig, Reading
from pipeline.data.labels import class_numbers, unknown_label
from pipeline.data.manifest import FORMAT, MANIFEST, SAMPLES, SAMPLES_FORMAT, SPLITS, UNFINISHED
from pipeline.data.scan import Scan, scan
from pipeline.data.sources.parquet import ParquetPart
from pipeline.data.sources.parts import Part
from pipeline.data.sources.splits import VALIDATION_FRACTION, held_out
from pipeline.errors import InputError
from pipeline.versions import check_readable

AS_FOUND = Reading()


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
        order: of the content as it is cut into groups: a run goes on only on data of the same order.
        quarantined: images that are left out: damaged ones of prepared data, those of no known class of raw data.
        settings: with which jobs/prepare.py made it; none for raw data.
    """

    uri: str
    split: str
    image: ImageConfig
    groups: tuple[Group, ...]
    fingerprint: str
    quarantined: int = 0
    order: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Images in this split."""
        return sum(group.rows for group in self.groups)


def row_group(uri: str, number: int, rows: int) -> Group:
    """All of one row group of a file that jobs/prepare.py or jobs/generate.py wrote."""
    folder, _, name = uri.rpartition("/")
    return Group(ParquetPart(folder, (name,), start=number, count=1, prepared=True), rows)


@dataclass(frozen=True)
class Splits:
    """A dataset, opened once: `splits["train"]` is the index of a split.

    Attributes:
        indexes: of the splits that hold images, by name.
        found: one line that says what raw data was found to be; "" for prepared data.
    """

    uri: str
    indexes: dict[str, DatasetIndex]
    found: str = ""

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


def open_dataset(
    uri: str, split: str = "train", image_size: int = 0, reading: Reading = AS_FOUND
) -> DatasetIndex:
    """One split of a dataset; see `open_splits`, which opens all of them for the price of one.

    Raises:
        InputError: see `open_splits`; no such split, or no images in it.
    """
    return open_splits(uri, image_size, reading)[split]


def open_splits(
    uri: str, image_size: int = 0, reading: Reading = AS_FOUND, split: tuple[str, ...] = ()
) -> Splits:
    """Opens what jobs/prepare.py or jobs/generate.py wrote, or any of the formats that the former reads.

    Images that were not prepared are read once, here, undecoded: for their hashes, by which a tenth of them is held
    out where the source has no split for that, their labels and their sizes.

    Args:
        image_size: to bring the images to; 0 = their own.
        reading: how raw data is read.
        split: the source's own splits to use, where it was not prepared; see `splits.roles_of`.

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
    splits = _open_source(uri, image_size, reading, split)
    print(f"--data {splits.found}", file=sys.stderr, flush=True)
    return splits


def _open_prepared(uri: str, image_size: int) -> Splits:
    try:
        manifest = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
        check_readable(manifest.get("versions"), f"--data {uri}")
        if manifest["format"] == SAMPLES_FORMAT:
            return _open_source(storage.join(uri, SAMPLES), image_size, AS_FOUND, ())
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
                order=_hash([(shard["sha256"], shard["row_groups"]) for shard in split["shards"]]),
                settings=manifest.get("settings", {}),
            )
            for name, split in manifest["splits"].items()
            if split["rows"]
        }
        return Splits(uri, indexes)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"--data {uri}: damaged {MANIFEST} ({type(error).__name__}: {error})") from None


def _open_source(uri: str, image_size: int, reading: Reading, split: tuple[str, ...]) -> Splits:
    found = scan(uri, reading, split)
    size = image_size or found.size
    if not size:
        raise InputError(f"--data {uri}: its images are not squares of one size: give --image-size")
    image = ImageConfig(size, found.channels, found.classes)
    groups, digests, bad = _groups(found)
    fingerprint = sum(int.from_bytes(digest, "big") for some in digests.values() for digest in some) % 2**256
    indexes = {
        name: DatasetIndex(
            uri=uri,
            split=name,
            image=image,
            groups=tuple(some),
            fingerprint=f"{fingerprint:064x}",
            quarantined=len(bad),
            order=_hash([[group.rows for group in some], digests[name]]),
        )
        for name, some in groups.items()
        if some
    }
    if not indexes:
        named = "".join(f": {entry['path']} ({entry['reason']})" for entry in bad[:1])
        raise InputError(f"--data {uri}: holds no images that can be used{named}")
    counts = {name: index.rows for name, index in indexes.items()}
    return Splits(uri, indexes, found.opened.describe(counts, found.classes, bad))


def _groups(found: Scan) -> tuple[dict[str, list[Group]], dict[str, list[bytes]], list[dict[str, str]]]:
    """The groups of each split, the hash of each image in them with its label, and what can't be used."""
    number_of = class_numbers(found.classes)
    bad = [{"path": path, "reason": reason} for path, reason in found.opened.listing.bad.items()]
    groups: dict[str, list[Group]] = {name: [] for name in SPLITS}
    digests: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    for scanned in found.parts:
        labels: dict[str, dict[int, int]] = {name: {} for name in SPLITS}  # by place in the part
        role, unknown = found.opened.roles[scanned.part.split], list[int]()
        for place, (digest, label) in enumerate(zip(scanned.digests, scanned.labels, strict=True)):
            if place in scanned.bad:
                bad.append(scanned.bad[place])
            elif (number := number_of(label)) is None:
                unknown.append(place)
            else:
                name = role or SPLITS[held_out(digest, VALIDATION_FRACTION)]
                labels[name][place] = number
                digests[name].append(hashlib.sha256(digest + str(label).encode()).digest())
        for item in scanned.part.read(unknown) if unknown else ():  # for their paths
            bad.append({"path": item.path, "reason": unknown_label(item.label, found.classes)})
        for name, mine in labels.items():
            if mine:
                kept = None if len(mine) == len(scanned.digests) else tuple(mine)
                groups[name].append(Group(scanned.part, len(mine), kept, tuple(mine.values())))
    return groups, digests, bad


def _hash(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def read_rows(group: Group, rows: np.ndarray) -> pa.Table:
    """Rows of one group, still encoded.

    Args:
        rows: int [N], positions in the group, in any order.

    Returns:
        columns bytes (large_binary), label (int64, -1 for none) and path (string), in the order asked for.
    """
    table = group.part.table(rows if group.kept is None else np.asarray(group.kept)[rows])
    if group.labels is not None:
        table = table.set_column(1, "label", pa.array(np.asarray(group.labels, np.int64)[rows]))
    return table
