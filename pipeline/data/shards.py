"""jobs/prepare.py: writes images as Parquet shards in exactly the Hugging Face convention, on the whole cluster.

There are two stages. The first decodes each part of the source (decoded.py). The second mixes the images of all parts
into shards (shuffle.py). A run after a killed one does only what is missing. A run on a source that changed decodes
only what is new, and writes the same bytes as a run from scratch.
"""

import hashlib
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pipeline import storage
from pipeline.cluster.pool import ActorPool, Pool, in_process
from pipeline.config import ImageConfig, ImageSize, Source, to_dict
from pipeline.data.decoded import DecodeParts, Pixels, Task, key_of, slots_of
from pipeline.data.finish import finish, make_manifest, remove_manifest, write_list
from pipeline.data.kept import Decoded, labels_of, read_records, unknown_labels
from pipeline.data.labels import names_of_all
from pipeline.data.manifest import (
    MANIFEST,
    PARTS,
    QUARANTINE,
    SHARDS,
    UNFINISHED,
    Manifest,
)
from pipeline.data.order import rows_per_group
from pipeline.data.shuffle import ShardTask, WriteShards, missing, runs_of, shard_tasks
from pipeline.data.sources.parts import Request
from pipeline.data.sources.registry import Opened, open_source
from pipeline.data.sources.splits import VALIDATION_FRACTION
from pipeline.display import Display
from pipeline.errors import InputError
from pipeline.lock import locked
from pipeline.output import check_apart, check_claim, check_unclaimed, is_inside, read_claim, write_claim
from pipeline.ranges import Natural, Positive, Range, Share, check_ranges, help_groups
from pipeline.versions import PREPARING

NAMED_BAD_IMAGES = 5
# A part is decoded in memory. Images of unknown size count as UNKNOWN_SIZE pixels wide and high.
PART_BYTES, UNKNOWN_SIZE = 256 * 2**20, 256
SMALL_BYTES = 16 * 2**20
Byte = Annotated[int, Range(ge=0, le=255)]


@help_groups(images="channels", columns="image_column", shards="rows_per_shard")
@dataclass(frozen=True)
class PrepareConfig:
    """What to read, and the images to make of it."""

    output: str
    """Folder for the shards (URI)."""
    source: Source = "auto"
    """Format of --input; auto finds it by looking at the files. digits is built in and needs no --input."""
    input: str = ""
    """Folder or file with the images (URI)."""
    image_size: ImageSize = 0
    """Width and height in pixels; 0 = the images' own, if all have the same."""
    validation_fraction: Annotated[float, Range(ge=0, lt=1)] = VALIDATION_FRACTION
    """Share of images to hold out, chosen by a hash of their content, if the source has no such split."""
    max_bad_fraction: Share = 0.01
    """Share of unusable images above which the job stops."""
    channels: Literal[0, 1, 3, 4] = 0
    """Colour channels: 1 = grey, 3 = colour, 4 = colour and alpha; 0 = the images' own, colour if they differ."""
    crop: Literal["centre", "none"] = "centre"
    """Cut out the central square, or keep the whole longer side so that training can crop at random (none)."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Colour behind transparent images: red, green and blue in 0..255."""
    image_column: str = ""
    """Column with the images in Parquet and Arrow files; empty = the only one of that type."""
    label_column: str = ""
    """Column with the labels in Parquet and Arrow files, or in a folder's metadata; none = read no labels."""
    split: tuple[str, ...] = ()
    """Splits of the source to use. Empty = all, but without the test split if there is a validation split."""
    rows_per_shard: Positive = 10_000
    """Images per shard, roughly."""
    rows_per_group: Natural = 0
    """Images per row group, the unit of reading and shuffling; 0 = chosen from the number and size of the images."""


def prepare(config: PrepareConfig) -> Manifest:
    """Writes `data/SPLIT-NNNNN.parquet`, manifest.json, quarantine.jsonl, ignored.jsonl and a dataset card.

    Raises:
        InputError: a setting, the input or the output can't be used, or too many images can't be used.
    """
    _check(config)
    size = config.image_size or UNKNOWN_SIZE
    per_part = max(1, min(config.rows_per_shard, PART_BYTES // (size * size * (config.channels or 3))))
    request = Request(per_part, config.image_column, config.label_column, config.split)
    opened = open_source(config.source, config.input, request)
    output = storage.absolute(config.output)
    with locked(output):
        return _prepare(config, opened, output)


def _check(config: PrepareConfig) -> None:
    check_ranges(config)
    check_apart(config.output, "--input", config.input)
    for folder in (SHARDS, PARTS):
        if config.input and is_inside(config.input, mine := storage.join(config.output, folder)):
            raise InputError(
                f"--input {config.input} lies in {mine}, where this job writes: choose another --output"
            )
    storage.check_writable(config.output)


def _prepare(config: PrepareConfig, opened: Opened, output: str) -> Manifest:
    settings, defaults = (_settings(some) for some in (config, PrepareConfig(output="")))
    image = _image(config, opened)
    if before := read_claim(output, UNFINISHED):
        check_claim(output, before, settings, defaults, of=PREPARING)
    else:
        if storage.exists(storage.join(output, MANIFEST)) or storage.sizes(storage.join(output, SHARDS)):
            raise InputError(
                f"--output {output} holds data that this job did not write: choose another folder"
            )
        check_unclaimed(output, UNFINISHED)
        write_claim(output, UNFINISHED, settings)
    records = _decode(config, opened, image, output)
    first, labels = labels_of(records)
    classes = opened.listing.classes or names_of_all(labels, first)
    bad = [{"path": path, "reason": reason} for path, reason in opened.listing.bad.items()]
    bad += [entry for record in records.values() for entry in record.bad]
    bad += unknown_labels(records, classes, output)
    bad.sort(key=lambda entry: (entry["path"], entry["reason"]))
    given = len(opened.listing.bad) + sum(record.rows + len(record.bad) for record in records.values())
    good = given - len(bad)
    if not given:
        raise InputError(f"--input {config.input}: holds no images")
    if not good or len(bad) > config.max_bad_fraction * given:
        # quarantine.jsonl beside a manifest belongs to that manifest. A refused run must not replace it.
        finished = storage.exists(storage.join(output, MANIFEST))
        listed = storage.join(output, PARTS, QUARANTINE) if finished else storage.join(output, QUARANTINE)
        write_list(listed, bad)
        named = "; ".join(f"{entry['path']} ({entry['reason']})" for entry in bad[:NAMED_BAD_IMAGES])
        raise InputError(
            f"{len(bad)} of {given} images can't be used, more than --max-bad-fraction "
            f"{config.max_bad_fraction:g} allows; all are listed in {listed}: {named}"
        )
    roles, size = opened.roles, sum(record.bytes for record in records.values())
    group = config.rows_per_group or rows_per_group(good, size)
    signature = hashlib.sha256(
        repr((sorted(records), sorted(roles.items()), classes, settings, group)).encode()
    ).hexdigest()
    tasks = shard_tasks(list(records.values()), roles, config.rows_per_shard, signature)
    chunks = tuple((roles[record.split], chunk) for record in records.values() for chunk in record.chunks)
    work = WriteShards(chunks, classes, config.validation_fraction, group, image.channels, output)
    _shuffle(work, tasks, size)
    manifest = make_manifest(opened, image, classes, tasks, len(bad), settings, output)
    finish(output, records, tasks, manifest, bad, opened.listing.ignored)
    counts = {name: split.rows for name, split in manifest.splits.items()}
    print(f"prepare: {opened.describe(counts, manifest.image['classes'], bad)}", file=sys.stderr, flush=True)
    return manifest


def _image(config: PrepareConfig, opened: Opened) -> ImageConfig:
    size = config.image_size or opened.listing.size
    if not size:
        raise InputError(
            f"--input {config.input}: its images may be of any size: give the one to make, such as --image-size 64"
        )
    return ImageConfig(size, config.channels or opened.listing.channels or 3)


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """The settings that decide the bytes of the shards."""
    return {key: value for key, value in to_dict(config).items() if key not in ("output", "max_bad_fraction")}


def _decode(config: PrepareConfig, opened: Opened, image: ImageConfig, output: str) -> dict[str, Decoded]:
    """The first stage: decodes every part in use. Returns the records by key, in the order of the parts."""
    pixels = Pixels(
        image.size, image.channels, config.image_size > 0, config.crop == "none", config.background
    )
    parts = tuple(part for part in opened.listing.parts if part.split in opened.roles)
    keys = [key_of(part, opened.tree, pixels) for part in parts]
    before = read_records(output)
    stale = {key: record for key, record in before.items() if key not in set(keys)}
    tasks = [
        Task(
            part, key, slot, tuple(c.file for r in stale.values() if _overlap(r.slot, slot) for c in r.chunks)
        )
        for part, key, slot in zip(parts, keys, slots_of(parts, pixels), strict=True)
        if key not in before
    ]
    if tasks:
        work, images = DecodeParts(pixels, config.validation_fraction, output), 0
        small = storage.is_local(config.input) and opened.size_of(task.part for task in tasks) < SMALL_BYTES
        with Display("prepare", len(keys), "parts") as display:
            pool = _pool(len(tasks), small=len(tasks) == 1 or small)
            for finished, rows in enumerate(pool(work, tasks), len(keys) - len(tasks) + 1):
                images += rows
                display.update(finished, f"{images} images")
        before = read_records(output)
    return {key: before[key] for key in keys}


def _overlap(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


def _shuffle(work: WriteShards, tasks: list[ShardTask], size: int) -> None:
    """The second stage: writes the shards that are missing.

    Args:
        size: size of all decoded images, in bytes.
    """
    left = missing(tasks, work.output)
    if not left:
        return
    remove_manifest(work.output)
    runs, finished = runs_of(left, size // len(tasks)), len(tasks) - len(left)
    with Display("prepare", len(tasks), "shards") as display:
        for written in _pool(len(runs), small=size < SMALL_BYTES)(work, runs):
            display.update(finished := finished + written, "")


def _pool(tasks: int, small: bool) -> Pool:
    """Who does them: this process where starting Ray and its workers would take longer than the work."""
    return in_process if small else ActorPool(tasks, gpu=False, least=1, ordered=False)
