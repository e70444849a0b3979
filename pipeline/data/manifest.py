"""Names of the files beside a dataset's images, and the manifest of a prepared dataset."""

from dataclasses import dataclass, field
from typing import Any

MANIFEST, CARD = "manifest.json", "README.md"
PARTS = "parts"
UNFINISHED = f"{PARTS}/settings.json"
QUARANTINE, IGNORED = "quarantine.jsonl", "ignored.jsonl"
FORMAT, SAMPLES_FORMAT = "ray-ddpm-shards", "ray-ddpm-samples"
SAMPLES = SHARDS = "data"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Shard:
    """One Parquet file.

    Attributes:
        file: path below the dataset's folder.
        row_groups: rows of each row group.
        bytes, sha256: size and hash of the file.
    """

    file: str
    rows: int
    row_groups: list[int]
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    rows: int
    shards: list[Shard]


@dataclass(frozen=True)
class Manifest:
    """The content of a prepared dataset's `manifest.json`.

    Attributes:
        image: size (pixels), channels and classes.
        fingerprint: hash of the set of (pixels, label) pairs, independent of the cut into shards.
        mean, std: mean and standard deviation of each channel over the training split, for pixels in [0, 1].
        quarantined: number of images left out; quarantine.jsonl names them.
        settings: the settings of jobs/prepare.py that decide the bytes of the shards.
        versions: format versions of the code that wrote the dataset; see `pipeline.versions`.
        source: kind of source that the images came from.
        ignored: number of files that are not data, by reason; ignored.jsonl names them.
    """

    format: str
    version: int
    image: dict[str, Any]
    splits: dict[str, Split]
    fingerprint: str
    mean: list[float]
    std: list[float]
    quarantined: int
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    source: str = ""
    ignored: dict[str, int] = field(default_factory=dict)
