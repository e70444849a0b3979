"""Walks the members of a tar with tarfile's own parser, past any damage.

tarfile itself silently stops at the first damaged header. This module searches for the next good header and reports
the stretch between.
"""

import io
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, cast

BLOCK = tarfile.BLOCKSIZE
# Types of members without file content: folders, and GNU's folder lists, lists of long names and volume labels.
WITHOUT_CONTENT = (tarfile.DIRTYPE, b"D", b"N", b"V")
CONTINUED = b"M"  # GNU: the rest of a file that begins in another tar
# Limits for one member's headers (long names, extended headers, sparse maps). A damaged header may claim any size.
_MOST_HEADER_BYTES = 2**20
_MOST_HEADER_READS = 64
_SCANNED_BYTES = 2**20


class Member(NamedTuple):
    """A member as its header describes it.

    Attributes:
        kind: tarfile's type; REGTYPE for every file.
        begins, ends: byte offsets of the member in the tar, with its headers and its padding.
        offset: byte offset of its data in the tar.
        size: size of the file in bytes; a sparse file stores fewer bytes.
        pieces: for a sparse file, (offset in the file, size) of each stored stretch.
        link: the name that a link leads to.
        missing: bytes of its data that are cut off by the end of the tar.
    """

    name: str
    kind: bytes
    begins: int
    ends: int
    offset: int
    size: int
    pieces: tuple[tuple[int, int], ...] = ()
    link: str = ""
    missing: int = 0


class Damage(NamedTuple):
    """A stretch of a tar, [begins, ends) in bytes, that can't be read, and the reason."""

    begins: int
    ends: int
    reason: str


def walk(file: IO[bytes], size: int) -> Iterator[Member | Damage]:
    """All members of a tar in order, with the damage between them. The content of members is not read.

    A tar of zeros alone yields nothing. Concatenated tars are read as one.

    Args:
        file: open for reading and seeking; its position changes.
        size: size of the tar in bytes.
    """
    parser = _parser(file)
    # The bytes from `end` to `here` belong to no member. `known`: they are the rest of a member that was cut short.
    here, end, known, found = 0, 0, False, False
    while here + BLOCK <= size:
        member = _member_at(parser, here, size)
        if member is None:
            here += BLOCK
            continue
        if not known and _any_bytes(file, end, member.begins):
            yield Damage(end, member.begins, f"no member can be read from byte {end} to byte {member.begins}")
        yield member
        found, known = True, member.missing > 0
        # The size in the header may be wrong, so other members may follow directly.
        here = end = member.offset if known else member.ends
    if known:
        return
    if _any_bytes(file, end, size):
        all_of_it = f"not a tar file: no member in its {size} bytes"
        yield Damage(end, size, f"no member can be read from byte {end} on" if found else all_of_it)
    elif found and end >= size:
        reason = f"ends at byte {size} without a tar's end marker: it may be cut short"
        yield Damage(size, size, reason)


def is_header(block: bytes) -> bool:
    """True if a member can begin with this block of 512 bytes."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except Exception:  # damaged headers make tarfile raise anything
        return False
    return True


class _Headers:
    """A file for tarfile's parser, with a limit on what may be read for one member's headers."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._bytes, self._reads = file, 0, 0

    def begin(self, place: int) -> None:
        self._bytes, self._reads = _MOST_HEADER_BYTES, _MOST_HEADER_READS
        self._file.seek(place)

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self._bytes or not self._reads:
            raise tarfile.ReadError("no header is so long")
        self._bytes -= count
        self._reads -= 1
        return self._file.read(count)

    def tell(self) -> int:
        return self._file.tell()


def _parser(file: IO[bytes]) -> tarfile.TarFile:
    # TarFile reads a member on creation and may fail on a damaged one, so it is created on an empty tar.
    empty = io.BytesIO(bytes(2 * BLOCK))
    parser = tarfile.TarFile(fileobj=empty, encoding="utf-8", errors="surrogateescape")
    parser.fileobj = cast(Any, _Headers(file))
    return parser


def _member_at(parser: tarfile.TarFile, here: int, size: int) -> Member | None:
    """The member whose headers begin at a byte offset; None for padding and for anything that is no header."""
    cast(_Headers, parser.fileobj).begin(here)
    try:
        info: Any = tarfile.TarInfo.fromtarfile(parser)
    except OSError:  # the storage failed
        raise
    except Exception:  # damaged headers make tarfile raise anything
        return None
    pieces = () if info.sparse is None else tuple(info.sparse) or ((0, 0),)
    stored = sum(length for _, length in pieces) if pieces else info.size
    ends = int(cast(Any, parser).offset)
    inside = all(place >= 0 and 0 <= length <= info.size - place for place, length in pieces)
    if info.size < 0 or ends < info.offset_data or not inside:
        return None
    # POSIX: a member of an unknown type is a file.
    is_file = info.isreg() or info.type not in (*tarfile.SUPPORTED_TYPES, *WITHOUT_CONTENT, CONTINUED)
    return Member(
        name=info.name,
        kind=tarfile.REGTYPE if is_file else info.type,
        begins=here,
        ends=ends,
        offset=info.offset_data,
        size=info.size,
        pieces=pieces,
        link=info.linkname,
        missing=max(0, info.offset_data + stored - size) if ends > info.offset_data else 0,
    )


def _any_bytes(file: IO[bytes], start: int, stop: int) -> bool:
    """True if the bytes [start, stop) are not all zero."""
    file.seek(start)
    return any(
        file.read(min(_SCANNED_BYTES, stop - at)).strip(b"\0") for at in range(start, stop, _SCANNED_BYTES)
    )
