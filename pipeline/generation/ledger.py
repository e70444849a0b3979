"""What an output folder holds: whose it is, which files are finished, and what does not belong.

A file is finished when it is there whole and its record, written after it, says so. A record also carries the digest of
the settings that its file was made with, so that no damage to other files lets samples of two settings mix.
"""

import contextlib
import hashlib
import json
import posixpath
import uuid
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.data.generated import PARTIAL, foreign, sizes
from pipeline.data.manifest import CARD, MANIFEST, SAMPLES
from pipeline.data.sources.parts import IMAGE_FOLDER_TABLE
from pipeline.errors import InputError
from pipeline.generation.chunks import Chunk, file_name, parse_name
from pipeline.generation.writers import SUFFIX
from pipeline.output import check_claim, read_claim, write_claim
from pipeline.versions import SAMPLING

SETTINGS = "settings.json"
DATA, RECORDS, FOREIGN = SAMPLES, "notes", "foreign"
PNG_METADATA = IMAGE_FOLDER_TABLE

Places = Callable[[Chunk], list[str]]
"""Paths of a chunk's files in the data folder: one, or one for each image."""


class ChunkRecord(NamedTuple):
    """What is known of a finished file.

    Attributes:
        bytes: its length; of a chunk written as single PNGs, their lengths together.
        sha256: of its bytes; of single PNGs, of their bytes one after the other.
        blank: images of one colour.
        nonfinite: images in which the sampler's numbers were not finite.
        settings: digest of the settings it was made with.
        arithmetic: what it was computed by; "" where it was made before that was written down.
    """

    rows: int
    bytes: int
    sha256: str
    blank: int
    nonfinite: int
    settings: str
    arithmetic: str = ""


def digest(wanted: dict[str, Any]) -> str:
    """Of settings, short."""
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]


def record_uri(output: str, chunk: Chunk, form: str) -> str:
    """Where the record of a chunk is."""
    return storage.join(output, RECORDS, f"{file_name(chunk, SUFFIX[form])}.json")


def write_record(output: str, chunk: Chunk, form: str, record: ChunkRecord) -> None:
    """The last thing that is done for a chunk."""
    storage.write_atomic(record_uri(output, chunk, form), json.dumps(record._asdict()).encode())


def parse_record(data: bytes, settings: str) -> ChunkRecord | None:
    """A record; None where it is damaged or of other settings."""
    try:
        record = ChunkRecord(**json.loads(data))
    except (ValueError, TypeError):
        return None
    return record if record.settings == settings else None


def read_record(output: str, chunk: Chunk, form: str, settings: str) -> ChunkRecord | None:
    """The record of a chunk, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        return parse_record(storage.read_bytes(record_uri(output, chunk, form)), settings)
    return None


def saved_settings(output: str) -> dict[str, Any] | None:
    """What the output was begun with, and the model; None where that is not known."""
    try:
        return read_claim(output, SETTINGS)
    except InputError:
        return None


def claim(output: str, wanted: dict[str, Any], model: dict[str, str]) -> None:
    """An output belongs to one model and one set of settings.

    Args:
        model: how it was asked for and the version that this meant; kept beside the settings.

    Raises:
        InputError: it holds other samples, or something else altogether.
    """
    if before := saved_settings(output):
        hints = {"model_fingerprint": f" ({before.get('model')})"}
        check_claim(output, before, wanted, hints=hints, of=SAMPLING)
    else:
        _check_unclaimed(output, digest(wanted))
        write_claim(output, SETTINGS, wanted, **model)


def _check_unclaimed(output: str, settings: str) -> None:
    """Whether an output without readable settings is new, or was begun with these."""
    records = list(storage.sizes(storage.join(output, RECORDS)))
    if any(_other_settings(data, settings) for data in storage.read_many(records[:1]).values()):
        raise InputError(
            f"--output {output}: {SETTINGS} is lost or damaged, and its samples were made with other settings than "
            "these: repeat the command that they were made with, or choose another folder"
        )
    for name in (DATA, MANIFEST, CARD):
        if not records and storage.exists(storage.join(output, name)):
            raise InputError(
                f"--output {output} holds {name}, which is not of this job: choose another folder"
            )


def _other_settings(record: bytes, settings: str) -> bool:
    with contextlib.suppress(ValueError, TypeError):
        return ChunkRecord(**json.loads(record)).settings != settings
    return False


def written(
    output: str, form: str, settings: str, places: Places
) -> tuple[dict[Chunk, ChunkRecord], dict[Chunk, ChunkRecord]]:
    """The finished chunks, in order, and those whose file is lost, cut short or covered by another; changes nothing."""
    lengths = sizes(output)
    whole, broken, position = dict[Chunk, ChunkRecord](), dict[Chunk, ChunkRecord](), 0
    for chunk, record in _records(output, form, settings).items():
        found = [lengths.get(place) for place in places(chunk)]
        # Two drivers of different --count, one of them killed, may leave chunks that overlap.
        if None not in found and sum(filter(None, found)) == record.bytes and chunk.start >= position:
            whole[chunk], position = record, chunk.stop
        else:
            broken[chunk] = record
    return whole, broken


def finished(output: str, form: str, settings: str, places: Places) -> dict[Chunk, ChunkRecord]:
    """The finished chunks, in order. Records of the others are removed."""
    whole, broken = written(output, form, settings, places)
    for chunk in broken:
        storage.remove(record_uri(output, chunk, form))
    return whole


def set_aside(output: str, whole: Iterable[Chunk], places: Places) -> int:
    """Moves what a reader would take for data, and is not, out of the way; returns how many files.

    To be called when nothing is being written any more: a file that has no record yet is one of them.
    """
    for folder in (DATA, RECORDS):
        for uri in storage.sizes(storage.join(output, folder)):
            if uri.endswith(PARTIAL):
                storage.remove(uri)
    moved = foreign(sizes(output), (place for chunk in whole for place in places(chunk)))
    for path in moved:
        to = f"{uuid.uuid4().hex[:8]}-{posixpath.basename(path)}"
        storage.move(storage.join(output, DATA, path), storage.join(output, FOREIGN, to))
    return len(moved)


def _records(output: str, form: str, settings: str) -> dict[Chunk, ChunkRecord]:
    """Records by chunk, ascending, of overlapping ones the longer first."""
    records = dict[Chunk, ChunkRecord]()
    contents = storage.read_many(list(storage.sizes(storage.join(output, RECORDS))))
    for uri, data in contents.items():
        name = posixpath.basename(uri).removesuffix(".json")
        chunk, record = parse_name(name), parse_record(data, settings)
        if chunk and record and name == file_name(chunk, SUFFIX[form]):
            records[chunk] = record
    return dict(sorted(records.items(), key=lambda item: (item[0].start, -item[0].stop)))
