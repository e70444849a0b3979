"""What lies beside a dataset's images and says what it is: the manifest of prepared shards, and names of files."""

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
    """One Parquet file."""

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
    """What `manifest.json` says of a prepared dataset.

    Attributes:
        source: kind of source that the images came from.
        fingerprint: a hash of the set of (pixels, label) pairs: how they are cut into shards does not matter.
        mean, std: per channel over the training split, of pixels in [0, 1].
        quarantined: images left out; named in quarantine.jsonl.
        ignored: files that are no data, by reason; named in ignored.jsonl.
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
