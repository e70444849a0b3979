"""Decodes plain JPEG and PNG files with libraries faster than Pillow, to the same pixels as Pillow.

Pillow takes some 100 us to open any file, which is most of the cost of a small image. The file's bytes alone decide
whether it is plain, so the choice is the same on every machine. Pillow reads all other files, and all files that the
fast libraries refuse, so one place decides what counts as damaged. One thing is not checked: a wrong checksum of the
compressed pixels inside a PNG chunk whose own checksum is right. Pillow finds that in some files.
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
# Chroma subsampling: grey, 4:4:4, 4:2:2 and 4:2:0.
_SAMPLINGS = (b"\x11", b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11")
# Smallest size and first bytes of each plain segment, by marker. A segment that may hold an orientation or further
# images is not plain.
_KNOWN = {
    0xFFE0: (16, b"JFIF\0"), 0xFFE2: (18, b"ICC_PROFILE\0"), 0xFFEE: (14, b"Adobe"),
    **dict.fromkeys((0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE), (2, b"")),
}  # fmt: skip
_UNKNOWN = 1 << 16, b""
# Smallest size of each plain PNG chunk, in bytes.
_LEAST = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7, b"tEXt": 0}
_TEXT = re.compile(rb"(?:Software|Comment|Title|Author|Description|Copyright|date:\w+)\0")
_MODES = {b"\x08\0\0\0\0": "L", b"\x08\2\0\0\0": "RGB", b"\x08\6\0\0\0": "RGBA"}  # by the header's end
_SEGMENT, _PAIR, _CHUNK = struct.Struct(">HH"), struct.Struct(">HH"), struct.Struct(">I4s")


def plain_pixels(data: bytes, at_least: int, most: int) -> np.ndarray | None:
    """The pixels of a plain file, equal to Pillow's.

    Args:
        at_least: see `images.open_image`.
        most: most pixels that an image may have.

    Returns:
        uint8 [H, W, C] of 1, 3 or 4 channels; None if the file is not plain or not intact.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data, at_least, most)
        return _png(data, most) if data.startswith(PNG) else None
    except (ValueError, RuntimeError, struct.error):  # a library refuses the file, or its header is cut off
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
    if at_least:  # scale as Pillow's `draft`: to a half, a quarter or an eighth
        wanted = int(GAP * at_least)
        scale = min(width // wanted, height // wanted)
        scale = next((part for part in (8, 4, 2) if scale >= part), 1)
        height, width = -(-height // scale), -(-width // scale)
    if width * height > most:
        return None
    # simplejpeg's other settings are libjpeg's defaults, as in Pillow. It refuses files that libjpeg warns about.
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
