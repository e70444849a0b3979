"""What an output folder holds: whose it is, which files are finished, and what does not belong.

A file is finished when it is there whole and its record, written after it, says so. A record also carries the digest of
the settings that its file was made with, so that no damage to other files lets samples of two settings mix.
"""

import bisect
import contextlib
import hashlib
import json
import posixpath
import sys
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.data.manifest import MANIFEST, SAMPLES
from pipeline.data.sources.parts import IMAGE_FOLDER_TABLE
from pipeline.errors import InputError
from pipeline.generation.chunks import Chunk, file_name, parse_name
from pipeline.generation.writers import SUFFIX, png_name
from pipeline.output import check_claim, read_claim, write_claim
from pipeline.versions import SAMPLING

SETTINGS = "settings.json"
CARD = "README.md"
DATA, RECORDS, FOREIGN = SAMPLES, "notes", "foreign"
PNG_METADATA = IMAGE_FOLDER_TABLE


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


def data_uri(output: str, chunk: Chunk, form: str) -> str:
    """Where the file of a chunk is (not for single PNGs)."""
    return storage.join(output, DATA, file_name(chunk, SUFFIX[form]))


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


def finished(output: str, form: str, settings: str) -> dict[Chunk, ChunkRecord]:
    """The finished chunks, in order. Records whose file is lost, cut short or covered by another are removed."""
    records = _records(output, form, settings)
    owner, lengths = _owners(form, records), dict[Chunk, int]()
    for uri, size in storage.sizes(storage.join(output, DATA)).items():
        if chunk := owner(posixpath.basename(uri)):
            lengths[chunk] = lengths.get(chunk, 0) + size
    whole, position = dict[Chunk, ChunkRecord](), 0
    for chunk, record in records.items():
        # Two drivers of different --count, one of them killed, may leave chunks that overlap.
        if lengths.get(chunk) == record.bytes and chunk.start >= position:
            whole[chunk], position = record, chunk.stop
        else:
            storage.remove(record_uri(output, chunk, form))
    return whole


def set_aside(output: str, form: str, whole: dict[Chunk, ChunkRecord]) -> int:
    """Moves what a reader would take for data, and is not, out of the way; returns how many files.

    To be called when nothing is being written any more: a file that has no record yet is one of them.
    """
    owner, moved = _owners(form, whole), 0
    for folder in (DATA, RECORDS):
        for uri in storage.sizes(storage.join(output, folder)):
            name = posixpath.basename(uri)
            if name.endswith(".partial"):
                storage.remove(uri)
            elif folder == DATA and name != PNG_METADATA and not owner(name):
                storage.move(uri, storage.join(output, FOREIGN, f"{uuid.uuid4().hex[:8]}-{name}"))
                moved += 1
    return moved


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


def _owners(form: str, chunks: dict[Chunk, ChunkRecord]) -> Callable[[str], Chunk | None]:
    """Says which of the chunks a file in the data folder belongs to, by its name."""
    ordered = sorted(chunks)

    def of_image(name: str) -> Chunk | None:
        index = name.removesuffix(".png")
        if not index.isdecimal() or name != png_name(int(index)):
            return None
        place = bisect.bisect_right(ordered, (int(index), sys.maxsize)) - 1
        return ordered[place] if place >= 0 and int(index) < ordered[place].stop else None

    def of_file(name: str) -> Chunk | None:
        chunk = parse_name(name)
        return chunk if chunk in chunks and name == file_name(chunk, SUFFIX[form]) else None

    return of_image if form == "png" else of_file
