"""Opens a dataset for training: its splits, and in each the groups of rows that can be read on their own."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.config import ImageConfig, Reading
from pipeline.data.generated import files_of
from pipeline.data.groups import Group, Groups, PackedGroups, pack, row_groups
from pipeline.data.labels import class_numbers, unknown_label
from pipeline.data.manifest import FORMAT, MANIFEST, SAMPLES, SAMPLES_FORMAT, SPLITS, UNFINISHED
from pipeline.data.order import Plan, batch_rows, lanes_for
from pipeline.data.scan import SCAN, Scan, scan
from pipeline.data.sources.splits import VALIDATION_FRACTION, held_out
from pipeline.errors import InputError
from pipeline.versions import check_readable

AS_FOUND = Reading()
# Size of a group where each image could be read alone: small, so that a batch mixes many places of the source.
GROUP_ROWS, GROUP_BYTES = 8, 256 * 2**10
# `poorly_mixed` warns if batches hold less than POORLY of a random batch's classes, measured on LOOKED_AT batches.
POORLY, LOOKED_AT = 0.75, 8


@dataclass(frozen=True)
class DatasetIndex:
    """One split of a dataset.

    Attributes:
        image: size, channels and class names.
        groups: groups in the dataset's own order; sample id = rows of all earlier groups + row in the group.
        fingerprint: hash of the whole dataset's content, independent of the cut into files.
        quarantined: number of images left out: damaged ones of prepared data, those of no known class of raw data.
        order: hash of the content and its cut into groups; a run resumes only on data with the same value.
        settings: settings of jobs/prepare.py; empty for raw data.
        bytes: approximate size of the encoded images.
        whole: True if a group can only be read whole.
    """

    uri: str
    split: str
    image: ImageConfig
    groups: Sequence[Group]
    fingerprint: str
    quarantined: int = 0
    order: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0
    whole: bool = True

    @property
    def rows(self) -> int:
        """Images in this split."""
        return int(self.first[-1])

    @property
    def first(self) -> np.ndarray:
        """Sample id of each group's first row, and the end: int64 [groups + 1]."""
        if isinstance(self.groups, Groups):
            return self.groups.first
        return np.cumsum([0, *(group.rows for group in self.groups)], dtype=np.int64)

    @property
    def group_rows(self) -> np.ndarray:
        """Rows of each group, int64 [groups]."""
        return np.diff(self.first)

    def plan(self, seed: int, batch_size: int) -> Plan:
        """The order in which a run reads this split."""
        lanes = lanes_for(len(self.groups), self.bytes, batch_size)
        return Plan(self.group_rows, seed, batch_size, lanes, self.whole)

    def poorly_mixed(self, plan: Plan) -> str:
        """A one-line warning if batches hold far fewer classes than random ones would; "" if not, or without labels."""
        if not isinstance(self.groups, PackedGroups):
            return ""
        labels, size = self.groups.labels, plan.batch_size
        _, counts = np.unique(labels[labels >= 0], return_counts=True)
        random = float(np.sum(1 - (1 - counts / len(labels)) ** size))
        batches = [
            batch_rows(plan, step, step + 1)
            for step in np.linspace(0, self.rows // size, LOOKED_AT, dtype=int).tolist()
        ]
        seen = [labels[plan.ids(rows)] for rows in batches]
        held = float(np.mean([len(np.unique(some[some >= 0])) for some in seen]))
        if held >= POORLY * random:
            return ""
        return (
            f"--data {self.uri}: its row groups are large and sorted by label: a batch of {size} holds some {held:.0f} "
            f"classes, a random one would hold {random:.0f}: jobs/prepare.py mixes all images"
        )


@dataclass(frozen=True)
class Splits:
    """A dataset, opened once: `splits["train"]` is the index of a split.

    Attributes:
        indexes: indexes of the splits that hold images, by name.
        found: one line that describes raw data; "" for prepared data.
        to_keep: result of reading the raw data through, for `keep`; empty if a file with it was there already.
    """

    uri: str
    indexes: dict[str, DatasetIndex]
    found: str = ""
    to_keep: bytes = b""

    def __getitem__(self, name: str) -> DatasetIndex:
        """The index of one split.

        Raises:
            InputError: there is no split of that name, or it holds no images.
        """
        if name not in self.indexes:
            raise InputError(
                f"--data {self.uri}: has no images in a split {name!r}; it has {', '.join(self.indexes)}"
            )
        return self.indexes[name]

    def __contains__(self, name: str) -> bool:
        return name in self.indexes

    def keep(self, output: str) -> "Splits":
        """Writes `to_keep` into a run's folder, so that a resume does not read all data again."""
        if self.to_keep:
            storage.write_atomic(storage.join(output, SCAN), self.to_keep)
        return replace(self, to_keep=b"")


def open_dataset(
    uri: str, split: str = "train", image_size: int = 0, reading: Reading = AS_FOUND
) -> DatasetIndex:
    """Opens one split of a dataset. `open_splits` opens all of them at the same cost.

    Raises:
        InputError: as `open_splits`; or there is no such split, or it holds no images.
    """
    return open_splits(uri, image_size, reading)[split]


def open_splits(
    uri: str,
    image_size: int = 0,
    reading: Reading = AS_FOUND,
    split: tuple[str, ...] = (),
    output: str = "",
) -> Splits:
    """Opens a dataset of jobs/prepare.py or jobs/generate.py, or raw data of any format that jobs/prepare.py reads.

    Raw data is read once here, without decoding, for its hashes, labels and sizes. If the source has no validation
    split, a tenth of the images is held out by hash.

    Args:
        image_size: width and height in pixels to resize to; 0 = the images' own size.
        reading: how to read raw data.
        split: the source's own splits to use, for raw data; see `splits.roles_of`.
        output: folder of a run that may have begun on this data. Files that did not change since are not read again;
            see `Splits.keep`.

    Raises:
        InputError: the folder does not exist or holds nothing that can be read, its manifest is damaged, or
            jobs/prepare.py has not finished it.
    """
    uri = storage.absolute(uri)
    if not storage.exists(uri, pattern=True):
        raise InputError(f"--data {uri}: no such folder")
    if manifest := _manifest(uri):
        return _open_prepared(uri, manifest, image_size)
    if storage.exists(storage.join(uri, UNFINISHED)):
        raise InputError(f"--data {uri}: jobs/prepare.py has not finished it: run it again to continue")
    kept = storage.join(output, SCAN) if output else ""
    splits = _open_source(uri, image_size, reading, split, kept)
    print(f"--data {splits.found}", file=sys.stderr, flush=True)
    return splits


def _manifest(uri: str) -> dict[str, Any] | None:
    """The manifest of prepared or generated data; None if there is none, or a file of this name is part of raw data."""
    if not storage.exists(place := storage.join(uri, MANIFEST)):
        return None
    try:
        found = json.loads(storage.read_bytes(place))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--data {uri}: damaged {MANIFEST} ({type(error).__name__}: {error})") from None
    return found if isinstance(found, dict) and found.get("format") in (FORMAT, SAMPLES_FORMAT) else None


def _open_prepared(uri: str, manifest: dict[str, Any], image_size: int) -> Splits:
    try:
        check_readable(manifest.get("versions"), f"--data {uri}")
        if manifest["format"] == SAMPLES_FORMAT:
            files_of(uri, manifest, "--data")
            return _open_source(storage.join(uri, SAMPLES), image_size, AS_FOUND, ())
        stored = manifest["image"]
        image = ImageConfig(image_size or stored["size"], stored["channels"], tuple(stored["classes"]))
        indexes = {
            name: DatasetIndex(
                uri=uri,
                split=name,
                image=image,
                groups=row_groups(
                    (storage.join(uri, shard["file"]), shard["row_groups"]) for shard in split["shards"]
                ),
                fingerprint=manifest["fingerprint"],
                quarantined=manifest["quarantined"],
                order=_hash([(shard["sha256"], shard["row_groups"]) for shard in split["shards"]]),
                settings=manifest.get("settings", {}),
                bytes=sum(shard["bytes"] for shard in split["shards"]),
            )
            for name, split in manifest["splits"].items()
            if split["rows"]
        }
        return Splits(uri, indexes)
    except (KeyError, TypeError) as error:
        raise InputError(f"--data {uri}: damaged {MANIFEST} ({type(error).__name__}: {error})") from None


def _open_source(
    uri: str, image_size: int, reading: Reading, split: tuple[str, ...], kept: str = ""
) -> Splits:
    found = scan(uri, reading, split, kept)
    size = image_size or found.size
    if not size:
        raise InputError(f"--data {uri}: its images are not squares of one size: give --image-size")
    image = ImageConfig(size, found.channels, found.classes)
    images = sum(len(scanned.digests) for scanned in found.parts)
    mean = sum(scanned.size for scanned in found.parts) // max(1, images)
    groups, digests, bad = _groups(found, max(1, min(GROUP_ROWS, GROUP_BYTES // max(1, mean))))
    fingerprint = sum(int.from_bytes(digest, "big") for some in digests.values() for digest in some) % 2**256
    indexes = {
        name: DatasetIndex(
            uri=uri,
            split=name,
            image=image,
            groups=pack(some),
            fingerprint=f"{fingerprint:064x}",
            quarantined=len(bad),
            order=_hash([[group.rows for group in some], digests[name]]),
            bytes=mean * len(digests[name]),
            whole=any(group.part.whole for group in some),
        )
        for name, some in groups.items()
        if some
    }
    if not indexes:
        named = "".join(f": {entry['path']} ({entry['reason']})" for entry in bad[:1])
        raise InputError(f"--data {uri}: holds no images that can be used{named}")
    counts = {name: index.rows for name, index in indexes.items()}
    return Splits(uri, indexes, found.opened.describe(counts, found.classes, bad), found.to_keep)


def _groups(
    found: Scan, rows: int
) -> tuple[dict[str, list[Group]], dict[str, list[bytes]], list[dict[str, str]]]:
    """The groups of each split, a hash of each image with its label, and the images that can't be used.

    Args:
        rows: rows in a group, unless the part must be read whole.
    """
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
        for item in scanned.part.read(unknown) if unknown else ():  # only to learn their paths
            bad.append({"path": item.path, "reason": unknown_label(item.label, found.classes)})
        for name, mine in labels.items():
            places, step = list(mine), len(mine) if scanned.part.whole else rows
            for first in range(0, len(mine), max(1, step)):
                some = places[first : first + step]
                numbers = [mine[place] for place in some]
                groups[name].append(
                    Group(scanned.part, len(some), np.array(some, np.int32), np.array(numbers, np.int64))
                )
    return groups, digests, bad


def _hash(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()
