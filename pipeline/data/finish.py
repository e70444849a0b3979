"""The last step of jobs/prepare.py: writes the lists, the manifest and the card, and deletes leftover files."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.config import ImageConfig
from pipeline.data.card import SplitSize, front_matter
from pipeline.data.kept import Decoded, record_uri
from pipeline.data.manifest import (
    CARD,
    FORMAT,
    IGNORED,
    MANIFEST,
    PARTS,
    QUARANTINE,
    SHARDS,
    SPLITS,
    Manifest,
    Shard,
    Split,
)
from pipeline.data.shuffle import ShardTask
from pipeline.data.sources.registry import Opened
from pipeline.redact import printable
from pipeline.versions import VERSIONS


def write_list(uri: str, entries: Iterable[dict[str, str]]) -> None:
    """Writes entries such as {path, reason}, one JSON object a line."""
    shown = ({key: printable(value) for key, value in entry.items()} for entry in entries)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in shown)
    storage.write_atomic(uri, lines.encode())


def remove_manifest(output: str) -> None:
    """Removes the manifest before its files change. From then on the dataset counts as unfinished."""
    if storage.exists(manifest := storage.join(output, MANIFEST)):
        storage.remove(manifest)


def finish(
    output: str,
    records: dict[str, Decoded],
    tasks: list[ShardTask],
    manifest: Manifest,
    bad: list[dict[str, str]],
    ignored: dict[str, str],
) -> None:
    """Writes the lists, the card and, last, the manifest; deletes leftover files. All shards must be written.

    Args:
        records: records of the decoded parts to keep, by key.
        tasks: all shards.
        bad: path and reason of each image that can't be used.
        ignored: reason by name, for files that are not data.
    """
    content = json.dumps(asdict(manifest), indent=1).encode()
    place = storage.join(output, MANIFEST)
    if storage.exists(place) and storage.read_bytes(place) != content:
        remove_manifest(output)
    _sweep(output, records, tasks, manifest)
    write_list(storage.join(output, QUARANTINE), bad)
    write_list(storage.join(output, IGNORED), ({"path": k, "reason": v} for k, v in ignored.items()))
    storage.write_atomic(storage.join(output, CARD), _card(manifest).encode())
    storage.write_atomic(place, content)


def make_manifest(
    opened: Opened,
    image: ImageConfig,
    classes: tuple[str, ...],
    tasks: list[ShardTask],
    bad: int,
    settings: dict[str, Any],
    output: str,
) -> Manifest:
    """The manifest of a finished dataset, made from the records of its shards.

    Args:
        bad: number of images left out.
        settings: settings that decide the bytes of the shards.
    """
    written = storage.read_many([task.record(output) for task in tasks])
    records = [json.loads(written[task.record(output)]) for task in tasks]
    shards = {task.file: Shard(**record["shard"]) for task, record in zip(tasks, records, strict=True)}
    splits = {
        split: Split(sum(shard.rows for shard in some), some)
        for split in SPLITS
        if (some := [shards[task.file] for task in tasks if task.split == split and shards[task.file].rows])
    }
    trained = [record for record in records if record["split"] == "train"]
    pixels = max(1, sum(record["count"] for record in trained))
    mean = np.sum([record["sum"] for record in trained] or [[0] * image.channels], axis=0) / pixels / 255
    square = (
        np.sum([record["squares"] for record in trained] or [[0] * image.channels], axis=0) / pixels / 255**2
    )
    return Manifest(
        format=FORMAT,
        version=1,
        image={"size": image.size, "channels": image.channels, "classes": list(classes)},
        splits=splits,
        fingerprint=f"{sum(int(record['hash'], 16) for record in records) % 2**256:064x}",
        mean=mean.tolist(),
        std=np.sqrt(np.maximum(square - mean**2, 0)).tolist(),
        quarantined=bad,
        settings=settings,
        versions=VERSIONS,
        source=opened.source,
        ignored=dict(Counter(opened.listing.ignored.values())),
    )


def _card(manifest: Manifest) -> str:
    """The dataset card, which tells Hugging Face's `datasets` the splits."""
    matter = front_matter(
        manifest.fingerprint,
        tuple(manifest.image["classes"]),
        {"source_sha256": "binary"},
        {name: [f"data/{name}-*.parquet"] for name in manifest.splits},
        {
            name: SplitSize(split.rows, sum(shard.bytes for shard in split.shards))
            for name, split in manifest.splits.items()
        },
    )
    counts = ", ".join(f"{split.rows:,} in {name}" for name, split in manifest.splits.items())
    size = manifest.image["size"]
    return (
        f"{matter}\n# Images of {size}x{size} pixels\n\n"
        f"{counts}. Written by ray-ddpm; fingerprint `{manifest.fingerprint}`.\n"
    )


def _sweep(output: str, records: dict[str, Decoded], tasks: list[ShardTask], manifest: Manifest) -> None:
    """Deletes files that earlier runs wrote for another state of the source."""
    stay = [shard.file for split in manifest.splits.values() for shard in split.shards]
    stay += [task.record(output) for task in tasks] + [record_uri(output, key) for key in records]
    stay += [chunk.file for record in records.values() for chunk in record.chunks]
    # Files are compared by name, because a store may list a URI in another spelling, e.g. if --output ends in a
    # slash.
    current = {storage.name(file) for file in stay}
    ours = re.compile(rf"[0-9a-f]{{40}}(-\d+\.\w+|\.json)|({'|'.join(SPLITS)})-\d{{5,}}\.(parquet|shard)")
    for uri in [file for name in (PARTS, SHARDS) for file in storage.list_files(storage.join(output, name))]:
        name = storage.name(uri)
        # The list of a refused run lies here too.
        if (ours.fullmatch(name) and name not in current) or name == QUARANTINE:
            storage.remove(uri)
