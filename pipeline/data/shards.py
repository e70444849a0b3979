"""Writing Parquet image shards, in exactly the Hugging Face convention, as a Ray Data job over the cluster.

Each part of the source becomes one shard of every split, written whole or not at all, and a record of what is in
it; a run that was killed goes on with the parts that have no record yet, and gives the same bytes.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from pipeline import storage
from pipeline.cluster.pool import ActorPool
from pipeline.cluster.session import spilled_bytes
from pipeline.config import ImageConfig, check_at_least, to_dict
from pipeline.data.images import DecodeError, decode, encode_png, fit, open_image
from pipeline.data.index import VALIDATION_FRACTION, held_out
from pipeline.data.labels import MOST_UNNAMED_CLASSES, class_numbers, is_number, name_classes
from pipeline.data.manifest import FORMAT, MANIFEST, SPLITS, UNFINISHED, Manifest, Shard, Split
from pipeline.data.shard_writer import ShardWriter, Totals, huggingface_schema
from pipeline.data.sources.parts import Part, Source, SourceListing
from pipeline.data.sources.registry import list_source
from pipeline.display import Display
from pipeline.errors import InputError
from pipeline.lock import locked
from pipeline.output import check_claim, read_claim, write_claim
from pipeline.versions import VERSIONS

QUARANTINE = "quarantine.jsonl"
NAMED_BAD_IMAGES = 5


@dataclass(frozen=True)
class PrepareConfig:
    """What to read, and the images to make of it."""

    output: str
    """Folder for the shards (URI)."""
    source: Source = "digits"
    """Kind of --input: digits (embedded, needs none), idx, folder (class = folder), webdataset, huggingface."""
    input: str = ""
    """Where the images are (URI)."""
    image_size: int = 0
    """Width and height in pixels; 0 = the source's own, where all its images have one."""
    channels: Literal[0, 1, 3] = 0
    """1 = grey, 3 = colour; 0 = the source's own, colour where it varies."""
    validation_fraction: float = VALIDATION_FRACTION
    """Share of images held out, chosen by a hash of their content: re-sharding does not move them."""
    rows_per_shard: int = 10_000
    """Images read into one pair of shards."""
    rows_per_group: int = 64
    """Images in one row group, the unit of reading and shuffling."""
    max_bad_fraction: float = 0.01
    """Share of undecodable images at which the job stops."""
    crop: Literal["centre", "none"] = "centre"
    """Cut a square out of the middle, or keep all of the longer side (then training can crop at random)."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour under transparent images, red green blue in 0..255."""


def prepare(config: PrepareConfig) -> Manifest:
    """Writes `data/SPLIT-NNNNN.parquet`, manifest.json, quarantine.jsonl and a dataset card.

    Raises:
        InputError: a setting, an input or an output that can't be used; too many undecodable images.
    """
    _check(config)
    source = _with_class_names(list_source(config.source, config.input, config.rows_per_shard))
    image = _image(config, source)
    output = storage.absolute(config.output)
    with locked(output):
        return _prepare(config, source, image, output)


def _prepare(config: PrepareConfig, source: SourceListing, image: ImageConfig, output: str) -> Manifest:
    settings, defaults = (_settings(some) for some in (config, PrepareConfig(output="")))
    if before := read_claim(output, UNFINISHED):
        check_claim(output, before, settings, defaults)
    else:
        write_claim(output, UNFINISHED, settings)
    missing = [n for n in range(len(source.parts)) if not storage.exists(_record_uri(output, n))]
    if missing:
        display = Display("prepare", len(source.parts), "parts")
        images = finished = 0
        work = _Shards(image, config, output)
        pool = ActorPool(len(missing), gpu=False, least=1, ordered=False)
        try:
            for rows in pool(work, [(n, source.parts[n]) for n in missing]):
                finished, images = finished + 1, images + rows
                display.update(len(source.parts) - len(missing) + finished, f"{images} images")
        finally:
            display.close()
        if spilled := spilled_bytes():
            print(f"Ray's object store spilled {spilled:,} bytes to disk", file=sys.stderr, flush=True)
    records = [json.loads(storage.read_bytes(_record_uri(output, n))) for n in range(len(source.parts))]
    return _finish(config, image, records, output, settings)


def _check(config: PrepareConfig) -> None:
    if not 0 <= config.validation_fraction < 1:
        raise InputError(f"--validation-fraction {config.validation_fraction} is outside 0 to 1")
    check_at_least(config, rows_per_shard=1, rows_per_group=1, image_size=0)
    storage.check_writable(config.output)


def _with_class_names(source: SourceListing) -> SourceListing:
    """The listing with the classes by name, in order, where its labels are texts; numbers name themselves.

    Where nothing lists the labels and the first of them is a text, all are read once, over the cluster.

    Raises:
        InputError: so many different texts that they can't be classes.
    """
    if source.classes is not None:
        return source
    labels = set[str]()
    if not is_number(_first_label(source.parts[0])):
        for found in ActorPool(len(source.parts), gpu=False, least=1, ordered=False)(_Labels(), source.parts):
            labels |= found
            if len(labels) > MOST_UNNAMED_CLASSES:
                break
    return replace(source, classes=name_classes(labels))


def _first_label(part: Part) -> str:
    """As it stands beside the first image that has one; a number where none has."""
    return next((item.label for item in part.read() if item.label is not None), "0")


class _Labels:
    """All labels in a part; see `pool.Work`."""

    def start(self, device: str) -> Callable[[Part], set[str]]:
        return lambda part: {item.label for item in part.read() if item.label is not None}


def _image(config: PrepareConfig, source: SourceListing) -> ImageConfig:
    size = config.image_size or source.size
    if not size:
        raise InputError(f"--source {config.source} has images of any size: give --image-size")
    return ImageConfig(size, config.channels or source.channels or 3, source.classes or ())


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the bytes of the shards."""
    return {key: value for key, value in to_dict(config).items() if key not in ("output", "max_bad_fraction")}


def _record_uri(output: str, number: int) -> str:
    return storage.join(output, "parts", f"{number:05d}.json")


@dataclass(frozen=True)
class _Shards:
    """Writes the shards of a numbered part, and says how many images are in them; see `pool.Work`."""

    image: ImageConfig
    config: PrepareConfig
    output: str

    def start(self, device: str) -> Callable[[tuple[int, Part]], int]:
        """Has nothing to set up."""
        return lambda task: _write_part(*task, **vars(self))


def _write_part(
    number: int,
    part: Part,
    image: ImageConfig,
    config: PrepareConfig,
    output: str,
) -> int:
    """Decodes one part and writes its shards, then its record."""
    writers = {
        split: ShardWriter(huggingface_schema(image.classes), config.rows_per_group) for split in SPLITS
    }
    number_of = class_numbers(image.classes)
    bad: list[dict[str, str]] = []
    totals = Totals(image.channels)
    for item in part.read():
        try:
            pixels = _pixels(item.data, image, config)
            if (label := number_of(item.label)) is None:
                known = len(image.classes)
                reason = f"not among the {known} classes" if known else "not a class number"
                raise DecodeError(f"label {item.label!r} is {reason}")
        except DecodeError as error:
            bad.append({"path": item.path, "reason": str(error)})
            continue
        digest = hashlib.sha256(pixels.tobytes() + str(item.label).encode()).digest()
        validates = held_out(digest, config.validation_fraction)
        split = SPLITS[validates]
        writers[split].add(encode_png(pixels), item.path, label=None if label < 0 else label)
        totals.add(pixels, digest, label, train=not validates)
    shards = {}
    for split, writer in writers.items():
        if writer.rows:
            data = writer.close()
            name = f"data/{split}-{number:05d}.parquet"
            storage.write_atomic(storage.join(output, name), data)
            digest_hex = hashlib.sha256(data).hexdigest()
            shards[split] = asdict(Shard(name, writer.rows, writer.row_groups, len(data), digest_hex))
    record = {"shards": shards, "bad": bad, **totals.to_dict()}
    storage.write_atomic(_record_uri(output, number), json.dumps(record).encode())
    return sum(shard["rows"] for shard in shards.values())


def _pixels(data: bytes, image: ImageConfig, config: PrepareConfig) -> np.ndarray:
    if config.image_size == 0 and open_image(data).size != (image.size, image.size):
        raise DecodeError(f"not {image.size}x{image.size}")
    if config.crop == "none":
        return fit(data, image.size, image.channels, config.background)
    return decode(data, image.size, image.channels, background=config.background)


def _finish(
    config: PrepareConfig,
    image: ImageConfig,
    records: list[dict[str, Any]],
    output: str,
    settings: dict[str, Any],
) -> Manifest:
    bad = [entry for record in records for entry in record["bad"]]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad)
    storage.write_atomic(storage.join(output, QUARANTINE), lines.encode())
    splits = {
        split: Split(sum(shard.rows for shard in shards), shards)
        for split in SPLITS
        if (shards := [Shard(**record["shards"][split]) for record in records if split in record["shards"]])
    }
    good = sum(split.rows for split in splits.values())
    if not good or len(bad) > config.max_bad_fraction * (good + len(bad)):
        named = "; ".join(f"{entry['path']} ({entry['reason']})" for entry in bad[:NAMED_BAD_IMAGES])
        raise InputError(
            f"{len(bad)} of {good + len(bad)} images can't be used, more than --max-bad-fraction "
            f"{config.max_bad_fraction:g} allows; all are listed in {storage.join(output, QUARANTINE)}: {named}"
        )
    pixels = max(1, sum(record["pixels"] for record in records))
    mean = np.sum([record["sum"] for record in records], axis=0) / pixels / 255
    square = np.sum([record["squares"] for record in records], axis=0) / pixels / 255**2
    top = max(record["top_label"] for record in records)
    classes = image.classes or name_classes({str(top)})
    fingerprint = sum(int(record["hash"], 16) for record in records) % 2**256
    manifest = Manifest(
        format=FORMAT,
        version=1,
        image={"size": image.size, "channels": image.channels, "classes": list(classes)},
        splits=splits,
        fingerprint=f"{fingerprint:064x}",
        mean=mean.tolist(),
        std=np.sqrt(np.maximum(square - mean**2, 0)).tolist(),
        quarantined=len(bad),
        settings=settings,
        versions=VERSIONS,
    )
    storage.write_atomic(storage.join(output, "README.md"), _card(manifest).encode())
    storage.write_atomic(storage.join(output, MANIFEST), json.dumps(asdict(manifest), indent=1).encode())
    return manifest


def _card(manifest: Manifest) -> str:
    files = "".join(f"  - split: {name}\n    path: data/{name}-*.parquet\n" for name in manifest.splits)
    counts = ", ".join(f"{split.rows:,} in {name}" for name, split in manifest.splits.items())
    size = manifest.image["size"]
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n\n# Images of {size}x{size} pixels\n\n"
        f"{counts}. Written by ray-ddpm; fingerprint `{manifest.fingerprint}`.\n"
    )
