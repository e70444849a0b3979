"""Damaged image files: complete pixels are used whatever else is broken, and incomplete images are refused."""

import re
import struct
import zlib
from collections.abc import Callable
from itertools import islice

from PIL import Image

from pipeline.data.depth import png_chunks
from pipeline.data.formats import PNG, DecodeError
from pipeline.data.jpeg_damage import all_blocks, repaired_jpeg, segment_end

_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"sBIT", b"eXIf", b"IDAT")
_PNG_KNOWN = re.compile(rb"PLTE|tRNS|sBIT|eXIf|IDAT|IEND")
_TRIES = 1000  # most places to test for the next intact chunk after a broken one
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_WEBP_PIXELS = (b"VP8X", b"ALPH", b"VP8 ", b"VP8L", b"ANIM", b"ANMF")
_WEBP_KNOWN = re.compile(rb"VP8X|ALPH|VP8 |VP8L|ANIM|ANMF|EXIF")
# The tags that decide the pixels, and the orientation. All other tags are metadata.
_TIFF_KEPT = {
    *range(254, 260), 262, 266, *range(273, 275), *range(277, 282), 284, 292, 293, 317, 320, *range(322, 326), 332,
    *range(338, 342), 347, *range(512, 522), *range(529, 533),
}  # fmt: skip


def repaired(kind: str, data: bytes) -> bytes | None:
    """The file without its broken parts, if its pixels are complete; None if no such file can be made.

    Args:
        kind: format, a name of `formats.FORMATS`.
    """
    repair = _REPAIRS.get(kind)
    try:
        return repair(data) if repair else None
    except (struct.error, IndexError, zlib.error):  # the file ends too early
        return None


def check_whole(kind: str, data: bytes, image: Image.Image, at_least: int) -> None:
    """Refuses images that Pillow filled up because the file holds only a part of the pixels.

    Args:
        kind: format, a name of `formats.FORMATS`.
        image: Pillow's decoding of `data`.
        at_least: see `images.open_image`.

    Raises:
        DecodeError: some pixels are missing.
    """
    if kind == "PNG":
        # Pillow fills missing rows with black or transparent. Missing rows of an interlaced image lie between others.
        if (data[28] or not _any(image)) and not _all_rows(data):
            raise DecodeError("PNG that ends before its last row")
    elif kind == "JPEG":
        # Pillow fills missing blocks with grey.
        if _last(image) in (128, (128, 128, 128)) and not all_blocks(data, image, at_least):
            raise DecodeError("JPEG that ends before its last pixels")
    elif kind == "JPEG2000" and not _all_tiles(data):
        raise DecodeError("JPEG 2000 that ends before its last tile")


def _last(image: Image.Image) -> float | tuple[int, ...] | None:
    return image.getpixel((image.width - 1, image.height - 1))


def _any(image: Image.Image) -> bool:
    last = _last(image)
    return any(last) if isinstance(last, tuple) else bool(last)


def _all_rows(data: bytes) -> bool:
    """True if a PNG file holds all bytes of pixels that its header announces."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    size = 0
    for left, top, right, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // right), -((top - height) // down)
        size += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    pixels = b"".join(content for kind, content in png_chunks(data) if kind == b"IDAT")
    try:
        return len(zlib.decompressobj().decompress(pixels, size)) == size
    except zlib.error:
        return False


def _repaired_png(data: bytes) -> bytes | None:
    kept, place, pixels = [PNG], len(PNG), False
    if data[12:16] != b"IHDR":
        return None
    palette = data[25] == 3
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IEND":
            break
        if _is_chunk(data, place):
            if kind in _PNG_KEPT:
                kept.append(_chunk(kind, data[place + 8 : place + 8 + size]))
                pixels = pixels or kind == b"IDAT"
            place += 12 + size
            continue
        # A capital first letter marks a chunk that decoding needs, except the palette of a true-colour image.
        needed = kind.isalpha() and not kind[0] & 0x20 and (palette or kind != b"PLTE")
        if needed or kind == b"tRNS":
            return None
        starts = (match.start() - 4 for match in islice(_PNG_KNOWN.finditer(data, place + 5), _TRIES))
        place = next((start for start in starts if _is_chunk(data, start)), len(data))
        if pixels and data[place + 4 : place + 8] == b"IDAT":
            return None  # the broken part may have held pixels
    whole = b"".join([*kept, _chunk(b"IEND", b"")])
    return whole if pixels and _all_rows(whole) else None


def _is_chunk(data: bytes, place: int) -> bool:
    """True if an intact chunk starts at `place`, or a chunk of pixels that the end of the file cuts off."""
    size, kind = struct.unpack_from(">I4s", data, place)
    end = place + 8 + size
    if end + 4 > len(data):
        return bool(kind == b"IDAT")
    return kind.isalpha() and zlib.crc32(data[place + 4 : end]) == int.from_bytes(data[end : end + 4], "big")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _all_tiles(data: bytes) -> bool:
    """True if every tile of a JPEG 2000 file is there in full length."""
    return _tiles_end(data) is not None


def _tiles_end(data: bytes) -> int | None:
    """End of a JPEG 2000 file's last tile, as a byte offset; None if tiles are cut off or missing."""
    place = data.find(b"\xff\x4f\xff\x51") + 2
    width, height, _, _, tile_width, tile_height, x, y = struct.unpack_from(">8I", data, place + 6)
    wanted = -((x - width) // tile_width) * -((y - height) // tile_height)
    while data[place : place + 2] != b"\xff\x90":  # start of a tile-part
        place = segment_end(data, place)
        if place >= len(data):
            return None
    parts, seen = dict[int, int](), dict[int, int]()
    while data[place : place + 2] == b"\xff\x90":
        tile, size, _, count = struct.unpack_from(">HIBB", data, place + 4)
        if not size:  # length 0: the tile runs to the end of the file
            return len(data) if data.endswith(b"\xff\xd9") else None
        place += size
        if place > len(data):
            return None
        seen[tile] = seen.get(tile, 0) + 1
        parts[tile] = max(parts.get(tile, 1), count)
    return place if len(seen) == wanted and all(seen[t] >= parts[t] for t in seen) else None


def _repaired_jpeg2000(data: bytes) -> bytes | None:
    end = _tiles_end(data)
    return data[:end] + b"\xff\xd9" if end is not None and data[end : end + 2] != b"\xff\xd9" else None


def _repaired_webp(data: bytes) -> bytes | None:
    kept, place, pixels = list[bytes](), 12, False
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, place)
        content = data[place + 8 : place + 8 + size]
        end = place + 8 + size + size % 2
        following = data[end : end + 4]
        if kind in _WEBP_PIXELS:
            if len(content) < size:
                if kind == b"ANMF" and pixels:
                    break  # the first frame is there
                return None
            pixels = pixels or kind in (b"VP8 ", b"VP8L", b"ANMF")
        elif len(content) < size or not (following.rstrip(b" ").isalnum() or end >= len(data)):
            starts = (match.start() for match in _WEBP_KNOWN.finditer(data, place + 4))
            place = next(starts, len(data))
            continue
        if kind in _WEBP_PIXELS or kind == b"EXIF":
            kept.append(kind + struct.pack("<I", size) + content + b"\0" * (size % 2))
        place = end
    if kept and kept[0].startswith(b"VP8X"):  # update its flags: no colour profile, no XMP
        flags = kept[0][8] & ~0x2C | (0x08 if any(chunk.startswith(b"EXIF") for chunk in kept) else 0)
        kept[0] = kept[0][:8] + bytes([flags]) + kept[0][9:]
    chunks = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks if pixels else None


def _repaired_tiff(data: bytes) -> bytes | None:
    """The file with only the first image, and of its tags only those that decide the pixels."""
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    counts, links, size, first = ("Q", "Q", 20, 8) if big else ("H", "I", 12, 4)
    (place,) = struct.unpack_from(order + links, data, first)
    (count,) = struct.unpack_from(order + counts, data, place)
    place += struct.calcsize(counts)
    entries = [data[i : i + size] for i in range(place, min(place + count * size, len(data)), size)]
    kept = [entry for entry in entries if struct.unpack(order + "H", entry[:2])[0] in _TIFF_KEPT]
    if len(kept) == len(entries):
        return None
    cut = bytearray(data)
    struct.pack_into(order + counts, cut, place - struct.calcsize(counts), len(kept))
    tags = b"".join(kept) + struct.pack(order + links, 0)
    cut[place : place + len(tags)] = tags
    return bytes(cut)


_REPAIRS: dict[str, Callable[[bytes], bytes | None]] = {
    "PNG": _repaired_png, "JPEG": repaired_jpeg, "JPEG2000": _repaired_jpeg2000, "WEBP": _repaired_webp,
    "TIFF": _repaired_tiff,
}  # fmt: skip
