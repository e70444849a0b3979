"""The members of a tar, read with tarfile's own parser, past any damage.

tarfile itself ends without a word at the first damaged header. Here the next good one is looked for, and the stretch
between is reported.
"""

import io
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, cast

BLOCK = tarfile.BLOCKSIZE
# Folders, and GNU's lists of them, lists of long names, and labels of tapes.
WITHOUT_CONTENT = (tarfile.DIRTYPE, b"D", b"N", b"V")
CONTINUED = b"M"  # GNU: the rest of a file that begins in another tar
# Of one member, for names, extended headers and maps of sparse files: a damaged header may claim anything.
_MOST_HEADER_BYTES = 2**20
_MOST_HEADER_READS = 64
_SCANNED_BYTES = 2**20


class Member(NamedTuple):
    """A member as its header describes it.

    Attributes:
        kind: tarfile's type; REGTYPE for every file.
        begins, ends: the bytes of the tar that it takes, with its headers and its padding.
        offset: byte of the tar at which its data begins.
        size: bytes of the file; fewer are stored where it is sparse.
        pieces: of a sparse file: place in the file, and size, of each stretch that is stored.
        link: the name that a link leads to.
        missing: bytes of its data that would lie behind the end of the tar.
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
    """A stretch of a tar, from its first byte to the one behind it, that can't be read, and why."""

    begins: int
    ends: int
    reason: str


def walk(file: IO[bytes], size: int) -> Iterator[Member | Damage]:
    """All members of a tar in their order, and its damage between them; the content of no member is read.

    A tar of nothing but zeros has neither. Tars that were written one behind the other are read as one.

    Args:
        file: open for reading and seeking; its place is another one afterwards.
        size: bytes in it.
    """
    parser = _parser(file)
    # The bytes from `end` to `here` belong to no member; `known`: they are the rest of one that was cut short.
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
        # Other members may lie behind a size that is wrong.
        here = end = member.offset if known else member.ends
    if known:
        return
    if _any_bytes(file, end, size):
        all_of_it = f"no tar file: there is no member in its {size} bytes"
        yield Damage(end, size, f"no member can be read from byte {end} on" if found else all_of_it)
    elif found and end >= size:
        reason = f"ends at byte {size} without the mark of a tar's end: it may have been cut short"
        yield Damage(size, size, reason)


def is_header(block: bytes) -> bool:
    """Whether a member can begin with this block."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except Exception:  # as of damaged headers
        return False
    return True


class _Headers:
    """A file as tarfile's parser sees it: so much may be read for one member, and no more."""

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
    # It reads a member as soon as it is made, and may fail at that: here it is of an empty tar.
    empty = io.BytesIO(bytes(2 * BLOCK))
    parser = tarfile.TarFile(fileobj=empty, encoding="utf-8", errors="surrogateescape")
    parser.fileobj = cast(Any, _Headers(file))
    return parser


def _member_at(parser: tarfile.TarFile, here: int, size: int) -> Member | None:
    """The member whose headers begin at a byte; None for padding and for what is no header."""
    cast(_Headers, parser.fileobj).begin(here)
    try:
        info: Any = tarfile.TarInfo.fromtarfile(parser)
    except OSError:  # of the storage
        raise
    except Exception:  # damaged headers make tarfile raise anything
        return None
    pieces = () if info.sparse is None else tuple(info.sparse) or ((0, 0),)
    stored = sum(length for _, length in pieces) if pieces else info.size
    ends = int(cast(Any, parser).offset)
    inside = all(place >= 0 and 0 <= length <= info.size - place for place, length in pieces)
    if info.size < 0 or ends < info.offset_data or not inside:
        return None
    # POSIX: a type that nobody knows is a file.
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
    """Whether there is anything but zeros."""
    file.seek(start)
    return any(
        file.read(min(_SCANNED_BYTES, stop - at)).strip(b"\0") for at in range(start, stop, _SCANNED_BYTES)
    )
