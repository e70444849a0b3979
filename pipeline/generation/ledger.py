"""What an output folder holds: whose it is, which files are finished, and what does not belong.

A file is finished when it is there whole and its note, written after it, says so. A note also carries the digest of
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

from pipeline.data import storage
from pipeline.data.index import SAMPLES
from pipeline.data.sources import BESIDE_IMAGES
from pipeline.errors import InputError
from pipeline.generation.plan import Piece, file_name, parse_name
from pipeline.generation.writers import SUFFIX, png_name

SETTINGS = "settings.json"
MANIFEST = "manifest.json"
CARD = "README.md"
DATA, NOTES, FOREIGN = SAMPLES, "notes", "foreign"
PNG_METADATA = BESIDE_IMAGES


class Note(NamedTuple):
    """What is known of a finished file.

    Attributes:
        bytes: its length; of a piece written as single PNGs, their lengths together.
        sha256: of its bytes; of single PNGs, of their bytes one after the other.
        blank: images of one colour.
        nonfinite: images in which the sampler's numbers were not finite.
        settings: digest of the settings it was made with.
    """

    rows: int
    bytes: int
    sha256: str
    blank: int
    nonfinite: int
    settings: str


def digest(wanted: dict[str, Any]) -> str:
    """Of settings, short."""
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]


def note_uri(output: str, piece: Piece, form: str) -> str:
    """Where the note of a piece is."""
    return storage.join(output, NOTES, f"{file_name(piece, SUFFIX[form])}.json")


def data_uri(output: str, piece: Piece, form: str) -> str:
    """Where the file of a piece is (not for single PNGs)."""
    return storage.join(output, DATA, file_name(piece, SUFFIX[form]))


def write_note(output: str, piece: Piece, form: str, note: Note) -> None:
    """The last thing that is done for a piece."""
    storage.write_atomic(note_uri(output, piece, form), json.dumps(note._asdict()).encode())


def parse_note(data: bytes, settings: str) -> Note | None:
    """A note; None where it is damaged or of other settings."""
    try:
        note = Note(**json.loads(data))
    except (ValueError, TypeError):
        return None
    return note if note.settings == settings else None


def read_note(output: str, piece: Piece, form: str, settings: str) -> Note | None:
    """The note of a piece, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        return parse_note(storage.read_bytes(note_uri(output, piece, form)), settings)
    return None


def saved_settings(output: str) -> dict[str, Any] | None:
    """What the output was begun with; None where that is not known."""
    try:
        settings = json.loads(storage.read_bytes(storage.join(output, SETTINGS)))
    except (FileNotFoundError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def claim(output: str, wanted: dict[str, Any], model: dict[str, str]) -> None:
    """An output belongs to one model and one set of settings.

    Args:
        model: how it was asked for and the version that this meant; kept beside the settings.

    Raises:
        InputError: it holds other samples, or something else altogether.
    """
    before = saved_settings(output)
    if before is None:
        _check_unclaimed(output, digest(wanted))
        content = json.dumps({**wanted, **model}, indent=1).encode()
        storage.write_atomic(storage.join(output, SETTINGS), content)
        return
    for key, value in wanted.items():
        if before.get(key) != value:
            hint = f" ({before.get('model')})" if key == "model_fingerprint" else ""
            raise InputError(
                f"--output {output} holds samples made with {key} = {before.get(key)}{hint}, now it is {value}: "
                "keep it, or choose another folder"
            )


def _check_unclaimed(output: str, settings: str) -> None:
    """Whether an output without readable settings is new, or was begun with these."""
    notes = list(storage.sizes(storage.join(output, NOTES)))
    if any(_other_settings(data, settings) for data in storage.read_many(notes[:1]).values()):
        raise InputError(
            f"--output {output}: {SETTINGS} is lost or damaged, and its samples were made with other settings than "
            "these: repeat the command that they were made with, or choose another folder"
        )
    for name in (DATA, MANIFEST, CARD):
        if not notes and storage.exists(storage.join(output, name)):
            raise InputError(
                f"--output {output} holds {name}, which is not of this job: choose another folder"
            )


def _other_settings(note: bytes, settings: str) -> bool:
    with contextlib.suppress(ValueError, TypeError):
        return Note(**json.loads(note)).settings != settings
    return False


def finished(output: str, form: str, settings: str) -> dict[Piece, Note]:
    """The finished pieces, in order. Notes whose file is lost, cut short or covered by another are removed."""
    notes = _notes(output, form, settings)
    owner, lengths = _owners(form, notes), dict[Piece, int]()
    for uri, size in storage.sizes(storage.join(output, DATA)).items():
        if piece := owner(posixpath.basename(uri)):
            lengths[piece] = lengths.get(piece, 0) + size
    whole, position = dict[Piece, Note](), 0
    for piece, note in notes.items():
        # Two drivers of different --count, one of them killed, may leave pieces that overlap.
        if lengths.get(piece) == note.bytes and piece.start >= position:
            whole[piece], position = note, piece.stop
        else:
            storage.remove(note_uri(output, piece, form))
    return whole


def set_aside(output: str, form: str, whole: dict[Piece, Note]) -> int:
    """Moves what a reader would take for data, and is not, out of the way; returns how many files.

    To be called when nothing is being written any more: a file that has no note yet is one of them.
    """
    owner, moved = _owners(form, whole), 0
    for folder in (DATA, NOTES):
        for uri in storage.sizes(storage.join(output, folder)):
            name = posixpath.basename(uri)
            if name.endswith(".partial"):
                storage.remove(uri)
            elif folder == DATA and name != PNG_METADATA and not owner(name):
                storage.move(uri, storage.join(output, FOREIGN, f"{uuid.uuid4().hex[:8]}-{name}"))
                moved += 1
    return moved


def _notes(output: str, form: str, settings: str) -> dict[Piece, Note]:
    """Notes by piece, ascending, of overlapping ones the longer first."""
    notes = dict[Piece, Note]()
    contents = storage.read_many(list(storage.sizes(storage.join(output, NOTES))))
    for uri, data in contents.items():
        name = posixpath.basename(uri).removesuffix(".json")
        piece, note = parse_name(name), parse_note(data, settings)
        if piece and note and name == file_name(piece, SUFFIX[form]):
            notes[piece] = note
    return dict(sorted(notes.items(), key=lambda item: (item[0].start, -item[0].stop)))


def _owners(form: str, pieces: dict[Piece, Note]) -> Callable[[str], Piece | None]:
    """Says which of the pieces a file in the data folder belongs to, by its name."""
    ordered = sorted(pieces)

    def of_image(name: str) -> Piece | None:
        index = name.removesuffix(".png")
        if not index.isdecimal() or name != png_name(int(index)):
            return None
        place = bisect.bisect_right(ordered, (int(index), sys.maxsize)) - 1
        return ordered[place] if place >= 0 and int(index) < ordered[place].stop else None

    def of_file(name: str) -> Piece | None:
        piece = parse_name(name)
        return piece if piece in pieces and name == file_name(piece, SUFFIX[form]) else None

    return of_image if form == "png" else of_file
