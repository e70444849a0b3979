"""Damaged JPEG files: finds their segments and scans, and decides whether all pixels are there."""

import hashlib
import re
from collections.abc import Iterator

from PIL import Image

from pipeline.data.scaling import opened

_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)
_SEGMENT = re.compile(rb"\xff[\xc0-\xc7\xc9-\xcf\xdb\xdd\xe0-\xef\xfe]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_END = b"\xff\xd9"
# Random bytes behind each of the eight possible first three bits. Where data is missing, some fillers decode to
# different pixels than others.
_FILLERS = tuple(
    bytes([first << 5 | 0x13]) + hashlib.sha512(bytes([first])).digest().replace(b"\xff", b"\x5a")
    for first in range(8)
)


def repaired_jpeg(data: bytes) -> bytes | None:
    """The JPEG file without its broken parts, if its pixels are complete; None if no such file can be made."""
    found = _header(data)
    if found is None:
        return None
    header, start = found
    whole = header + data[start:]
    scans, end = _scans(whole, len(header))
    if end is not None:
        return whole if whole != data else None
    whole = whole.rstrip(b"\xff")
    if not _has_all_scans(header, scans):
        return None
    pixels = {_pixels(other) for other in _continued(whole, len(header), _FILLERS)}
    return whole + _END if len(pixels) == 1 and None not in pixels else None


def all_blocks(data: bytes, image: Image.Image, at_least: int) -> bool:
    """True if a JPEG file decodes to the same pixels whatever data follows, so that none of its own is missing."""
    found = _header(data)
    if found is None:
        return True
    start = found[1]
    _, end = _scans(data, start)
    pixels, whole = image.tobytes(), data[:end]
    return all(_pixels(other, at_least) == pixels for other in _continued(whole, start, _FILLERS[:2]))


def _continued(data: bytes, start: int, fillers: tuple[bytes, ...]) -> Iterator[bytes]:
    """A JPEG file without its end marker, followed by each filler in turn; `start` is the offset of its first scan."""
    markers = _RESTART.findall(data, start)
    restart = bytes([0xFF, 0xD0 + (markers[-1][1] + 1) % 8 if markers else 0xD0])
    for filler in fillers:
        yield data + filler + _END
    # A decoder that waits for a restart marker skips everything up to it.
    for filler in fillers[:2]:
        yield data + restart + filler + _END


def _pixels(data: bytes, at_least: int = 0) -> bytes | None:
    try:
        return opened("JPEG", data, at_least).tobytes()
    except Exception:
        return None


def _header(data: bytes) -> tuple[bytes, int] | None:
    """The segments before the first scan that matter to the pixels, and the offset of that scan.

    A segment of a wrong length is left out if it says nothing of the pixels, and the next segment is searched for.
    Returns None if that fails.
    """
    kept, place, dead = [data[:2]], 2, set[int]()
    while _is_marker(data, place):
        marker, end = data[place + 1], segment_end(data, place)
        if marker == 0xDA:
            return b"".join(kept), place
        if end > place + 3 and _is_segment(data, end):
            exif = marker == 0xE1 and data[place + 4 : place + 8] == b"Exif"
            if marker < 0xE0 or marker in (0xE0, 0xEE) or exif:
                kept.append(data[place:end])
            place = end
            continue
        if marker < 0xE0 or marker == 0xEE:
            return None
        following = _next_segment(data, place + 4, dead)
        if following is None or b"Adobe\0d" in data[place + 4 : following]:  # decides the colours
            return None
        place = following
    return None


def _next_segment(data: bytes, place: int, dead: set[int]) -> int | None:
    """Offset at which the header goes on after a segment of a wrong length. Skips over an embedded preview."""
    while True:
        starts = (match.start() for match in _SEGMENT.finditer(data, place))
        following = next((start for start in starts if _leads_to_scan(data, start, dead)), None)
        if following is None:
            return None
        preview = data.find(b"\xff\xd8", place, following)
        if preview < 0:
            return following
        place = data.find(_END, preview) + 2
        if place < 2:
            return None


def _is_marker(data: bytes, place: int) -> bool:
    """True if the bytes at `place` look like the start of a segment."""
    if place + 4 > len(data) or data[place] != 0xFF:
        return False
    marker = data[place + 1]
    return 0xC0 <= marker <= 0xCF or 0xDA <= marker <= 0xEF or marker == 0xFE


def _is_segment(data: bytes, place: int) -> bool:
    """True if a whole segment is at `place`."""
    return _is_marker(data, place) and place + 4 <= segment_end(data, place) <= len(data)


def segment_end(data: bytes, place: int) -> int:
    """Offset of the next segment, after the one at `place`."""
    end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    while data[end : end + 2] == b"\xff\xff":
        end += 1
    return end


def _leads_to_scan(data: bytes, place: int, dead: set[int]) -> bool:
    passed = list[int]()
    while place not in dead and _is_segment(data, place):
        if data[place + 1] == 0xDA:
            return True
        passed.append(place)
        place = segment_end(data, place)
    dead.update(passed)
    return False


def _scans(data: bytes, start: int) -> tuple[list[bytes], int | None]:
    """The headers of a JPEG file's scans, and the offset of its end marker or None."""
    scans = list[bytes]()
    while match := _MARKER.search(data, start):
        marker, start = match[0][-1], match.end()
        if marker == 0xD9:
            return scans, match.start()
        if 0xC0 <= marker <= 0xFE and marker != 0xD8:
            end = start + int.from_bytes(data[start : start + 2], "big")
            if marker == 0xDA:
                scans.append(data[start + 2 : end])
            start = end
    return scans, None


def _has_all_scans(header: bytes, scans: list[bytes]) -> bool:
    """True if the scans refine every coefficient of every component to its last bit."""
    left = set[tuple[int, int]]()
    place, progressive = 2, False
    while place + 4 <= len(header):
        marker, end = header[place + 1], segment_end(header, place)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            progressive = marker in (0xC2, 0xC6, 0xCA, 0xCE)
            components = header[place + 10 : end : 3]
            left = {(component, k) for component in components for k in range(64)}
        place = end
    for scan in scans:
        if len(scan) < 4 or len(scan) < 4 + 2 * scan[0]:
            return False
        first, last, bits = scan[1 + 2 * scan[0] :][:3] if progressive else (0, 63, 0)
        if bits & 15 == 0:
            left -= {(c, k) for c in scan[1 : 1 + 2 * scan[0] : 2] for k in range(first, last + 1)}
    return bool(scans) and not left
