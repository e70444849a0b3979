"""JPEG and PNG files without anything unusual, decoded by faster libraries than Pillow to the pixels that it gives.

Pillow takes some 100 us to open any file, most of what a small image costs. Whether a file is plain is told by its
bytes alone, so the choice is the same everywhere. Pillow reads all others, and all that the fast libraries find fault
with: what counts as damaged is decided in one place. (One thing is not asked for: a wrong checksum in the compressed
pixels of a PNG chunk whose own checksum is right, which Pillow finds in some such files.)
"""

import re
import struct
from zlib import crc32

import numpy as np
import pyspng
import simplejpeg

from pipeline.data.formats import PNG
from pipeline.data.scaling import GAP

_SCAN, _FRAMES = 0xFFDA, (0xFFC0, 0xFFC1)  # markers of a JPEG file
# Grey; or colours, with as many samples as there are of brightness, half of them in a row, or half in rows and columns.
_SAMPLINGS = (b"\x11", b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11")
# By marker: the least bytes of a segment, and how it begins. Nothing that may tell of an orientation or of further
# images.
_KNOWN = {
    0xFFE0: (16, b"JFIF\0"), 0xFFE2: (18, b"ICC_PROFILE\0"), 0xFFEE: (14, b"Adobe"),
    **dict.fromkeys((0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE), (2, b"")),
}  # fmt: skip
_UNKNOWN = 1 << 16, b""
# Least bytes of a PNG file's chunks.
_LEAST = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7, b"tEXt": 0}
_TEXT = re.compile(rb"(?:Software|Comment|Title|Author|Description|Copyright|date:\w+)\0")
_MODES = {b"\x08\0\0\0\0": "L", b"\x08\2\0\0\0": "RGB", b"\x08\6\0\0\0": "RGBA"}  # by the end of its header
_SEGMENT, _PAIR, _CHUNK = struct.Struct(">HH"), struct.Struct(">HH"), struct.Struct(">I4s")


def plain_pixels(data: bytes, at_least: int, most: int) -> np.ndarray | None:
    """The pixels of a file, as Pillow gives them.

    Args:
        at_least: see `images.open_image`.
        most: pixels that an image may have.

    Returns:
        uint8 [H, W, C] of 1, 3 or 4 channels; None of a file that is not plain, or not sound.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data, at_least, most)
        return _png(data, most) if data.startswith(PNG) else None
    except (ValueError, RuntimeError, struct.error):  # what the libraries refuse; a header that is cut off
        return None


def _jpeg(data: bytes, at_least: int, most: int) -> np.ndarray | None:
    place, frame = 2, b""
    while True:
        marker, size = _SEGMENT.unpack_from(data, place)
        if marker == _SCAN:
            break
        start, place = place + 4, place + 2 + size
        if marker in _FRAMES and not frame:
            frame = data[start:place]
        elif size < (known := _KNOWN.get(marker, _UNKNOWN))[0] or not data.startswith(known[1], start):
            return None
    if frame[:1] != b"\x08" or frame[7::3] not in _SAMPLINGS or len(frame) != 6 + 3 * frame[5]:
        return None
    height, width = _PAIR.unpack_from(frame, 1)
    if at_least:  # as Pillow: by a half, a quarter or an eighth
        wanted = int(GAP * at_least)
        scale = min(width // wanted, height // wanted)
        scale = next((part for part in (8, 4, 2) if scale >= part), 1)
        height, width = -(-height // scale), -(-width // scale)
    if width * height > most:
        return None
    # Its other settings are libjpeg's own, as Pillow's; it refuses all that libjpeg warns of.
    kind = "GRAY" if frame[5] == 1 else "RGB"
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, kind, min_height=height, min_width=width)
    return pixels if pixels.shape[:2] == (height, width) else None


def _png(data: bytes, most: int) -> np.ndarray | None:
    mode, place, pixels = _MODES.get(data[24:29]), len(PNG) + 25, False
    width, height = struct.unpack_from(">II", data, 16)
    if data[8:16] != b"\0\0\0\x0dIHDR" or not mode or width * height > most or not _is_sound(data, 12, 29):
        return None
    while True:
        size, kind = _CHUNK.unpack_from(data, place)
        start, place = place + 8, place + 12 + size
        if kind == b"IEND":
            found: np.ndarray = pyspng.load(data, mode)
            return found if found.ndim == 3 else found[..., None]
        if kind == b"IDAT":
            pixels = True
        elif pixels or size < _LEAST.get(kind, 1 << 32):
            return None
        if not _is_sound(data, start - 4, start + size) or (kind == b"tEXt" and not _TEXT.match(data, start)):
            return None


def _is_sound(data: bytes, start: int, stop: int) -> bool:
    return crc32(data[start:stop]) == int.from_bytes(data[stop : stop + 4], "big")
