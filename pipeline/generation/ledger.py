"""Keeps track of an output folder: the settings it belongs to, its finished files, and files that do not belong.

A file counts as finished if it is complete and its record, which is written after it, says so. Each record contains a
hash of the settings that made the file. So samples of two settings never mix, even if other files are damaged.
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
from pipeline.errors import InputError, Outage
from pipeline.generation.chunks import Chunk, file_name, parse_name
from pipeline.generation.writers import SUFFIX
from pipeline.output import check_claim, check_unclaimed, read_claim, write_claim
from pipeline.versions import SAMPLING

SETTINGS = "settings.json"
DATA, RECORDS, FOREIGN = SAMPLES, "notes", "foreign"
PNG_METADATA = IMAGE_FOLDER_TABLE

Places = Callable[[Chunk], list[str]]
"""Paths of a chunk's files in the data folder: one, or one for each image."""


class ChunkRecord(NamedTuple):
    """The record of a finished file.

    Attributes:
        rows: number of samples in it.
        bytes: its length in bytes; for single PNGs, the sum of their lengths.
        sha256: hash of its bytes; for single PNGs, of their bytes one after the other.
        blank: number of images of one colour only.
        nonfinite: number of images in which the sampler's values were not finite.
        settings: hash of the settings that made it.
        arithmetic: hardware and libraries that computed it; "" if it was made before this was recorded.
    """

    rows: int
    bytes: int
    sha256: str
    blank: int
    nonfinite: int
    settings: str
    arithmetic: str = ""


def digest(wanted: dict[str, Any]) -> str:
    """A short hash of settings, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]


def record_uri(output: str, chunk: Chunk, form: str) -> str:
    """URI of a chunk's record."""
    return storage.join(output, RECORDS, f"{file_name(chunk, SUFFIX[form])}.json")


def write_record(output: str, chunk: Chunk, form: str, record: ChunkRecord) -> None:
    """Writes a chunk's record. This comes last and makes the chunk count as finished."""
    storage.write_atomic(record_uri(output, chunk, form), json.dumps(record._asdict()).encode())


def parse_record(data: bytes, settings: str) -> ChunkRecord | None:
    """Parses a record; None if it is damaged or of other settings."""
    try:
        record = ChunkRecord(**json.loads(data))
    except (ValueError, TypeError):
        return None
    return record if record.settings == settings else None


def read_record(output: str, chunk: Chunk, form: str, settings: str) -> ChunkRecord | None:
    """The record of a chunk; None if there is none, or it is damaged or of other settings."""
    with contextlib.suppress(FileNotFoundError):
        return parse_record(storage.read_bytes(record_uri(output, chunk, form)), settings)
    return None


def saved_settings(output: str) -> dict[str, Any] | None:
    """The settings and the model that the output was begun with; None if they are not known."""
    try:
        return read_claim(output, SETTINGS)
    except Outage:
        raise
    except InputError:
        return None


def claim(output: str, wanted: dict[str, Any], model: dict[str, str]) -> None:
    """Ties an output to one model and one set of settings.

    Args:
        wanted: the settings; see `config.identity`.
        model: the name under which the model was requested, and the resolved name; kept beside the settings.

    Raises:
        InputError: the output holds samples of other settings, or something else.
    """
    if before := saved_settings(output):
        hints = {"model_fingerprint": f" ({before.get('model')})"}
        check_claim(output, before, wanted, hints=hints, of=SAMPLING)
    else:
        _check_new(output, digest(wanted))
        write_claim(output, SETTINGS, wanted, **model)


def _check_new(output: str, settings: str) -> None:
    """Checks that an output without readable settings is new, or was begun with these settings."""
    check_unclaimed(output, SETTINGS)
    records = list(storage.sizes(storage.join(output, RECORDS)))
    if any(_other_settings(data, settings) for data in storage.read_many(records[:1]).values()):
        raise InputError(
            f"--output {output}: {SETTINGS} is lost or damaged, and its samples were made with other settings: "
            "repeat the command that made them, or choose another folder"
        )
    for name in (DATA, MANIFEST, CARD):
        if not records and storage.exists(storage.join(output, name)):
            raise InputError(
                f"--output {output} holds {name}, which this job did not write: choose another folder"
            )


def _other_settings(record: bytes, settings: str) -> bool:
    with contextlib.suppress(ValueError, TypeError):
        return ChunkRecord(**json.loads(record)).settings != settings
    return False


def written(
    output: str, form: str, settings: str, places: Places
) -> tuple[dict[Chunk, ChunkRecord], dict[Chunk, ChunkRecord]]:
    """The finished chunks in order, and the chunks whose file is lost, cut short or overlaps another. Changes nothing."""
    lengths = sizes(output)
    whole, broken, position = dict[Chunk, ChunkRecord](), dict[Chunk, ChunkRecord](), 0
    for chunk, record in _records(output, form, settings).items():
        found = [lengths.get(place) for place in places(chunk)]
        # Two drivers with different --count, one of them killed, may leave overlapping chunks.
        if None not in found and sum(filter(None, found)) == record.bytes and chunk.start >= position:
            whole[chunk], position = record, chunk.stop
        else:
            broken[chunk] = record
    return whole, broken


def finished(output: str, form: str, settings: str, places: Places) -> dict[Chunk, ChunkRecord]:
    """The finished chunks in order. The records of broken chunks are removed."""
    whole, broken = written(output, form, settings, places)
    for chunk in broken:
        storage.remove(record_uri(output, chunk, form))
    return whole


def set_aside(output: str, whole: Iterable[Chunk], places: Places) -> int:
    """Moves files out of the data folder that a reader would take for samples but that are none; returns their number.

    Call this only when nothing is being written, because a file without a record is moved too.
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
    """Records by chunk, in ascending order of the start; of several with the same start, the longest first."""
    records = dict[Chunk, ChunkRecord]()
    contents = storage.read_many(list(storage.sizes(storage.join(output, RECORDS))))
    for uri, data in contents.items():
        name = posixpath.basename(uri).removesuffix(".json")
        chunk, record = parse_name(name), parse_record(data, settings)
        if chunk and record and name == file_name(chunk, SUFFIX[form]):
            records[chunk] = record
    return dict(sorted(records.items(), key=lambda item: (item[0].start, -item[0].stop)))
