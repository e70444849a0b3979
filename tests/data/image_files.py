"""Image files built byte by byte, of kinds that Pillow reads but doesn't write."""

import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from tests.data.common import encode

Tag = tuple[int, Sequence[float] | bytes]
_SIZES = {1: "B", 2: "s", 3: "H", 4: "I", 6: "b", 7: "s", 8: "h", 9: "i", 11: "f", 12: "d"}


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return one chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    rows: np.ndarray,
    depth: int,
    colour: int,
    chunks: Sequence[tuple[bytes, bytes]] = (),
    width: int | None = None,
    pixels: bytes | None = None,
) -> bytes:
    """Return a PNG file.

    Args:
        rows: stored values [H, W] or [H, W, C]: 16-bit numbers at depth 16, else bytes.
        depth: bits per sample.
        colour: PNG's colour type.
        chunks: kind and content of the chunks between header and pixels.
        width: in pixels; needed if a byte holds several pixels.
        pixels: uncompressed data that replaces `rows` in the pixel chunk.
    """
    values = np.asarray(rows).astype(">u2" if depth == 16 else "u1")
    if pixels is None:
        pixels = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width or values.shape[1], len(values), depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in parts)


def tiff(
    planes: np.ndarray | list[bytes],
    bits: int,
    tags: dict[int, Tag] | None = None,
    *,
    photometric: int = 1,
    sample: int = 1,
    packed: bool = False,
    order: str = "<",
    size: tuple[int, int] | None = None,
) -> bytes:
    """Return a TIFF file with the tags before the pixels.

    Args:
        planes: values [H, W] or [H, W, C] in the stored type, or the bytes of each strip.
        bits: per sample.
        tags: additional tags by number: type and values.
        photometric: 0 = white is zero, 1 = black is zero, 2 = RGB, 3 = palette, 5 = CMYK.
        sample: 1 = unsigned, 2 = signed, 3 = floating point.
        packed: whether strips are compressed (deflate).
        order: byte order, "<" or ">".
        size: (width, height) in pixels; needed if `planes` are bytes.
    """
    if isinstance(planes, np.ndarray):
        height, width, count = (*planes.shape, 1)[:3]
        strips = [planes.astype(planes.dtype.newbyteorder(order)).tobytes()]
    else:
        assert size is not None
        (width, height), strips, count = size, planes, 1
    if packed:
        strips = [zlib.compress(strip) for strip in strips]
    entries: dict[int, Tag] = {
        256: (3, [width]), 257: (3, [height]), 258: (3, [bits] * count), 259: (3, [8 if packed else 1]),
        262: (3, [photometric]), 273: (4, [0] * len(strips)), 277: (3, [count]), 278: (3, [height]),
        279: (4, [len(strip) for strip in strips]), 339: (3, [sample] * count),
    } | (tags or {})  # fmt: skip
    first = len(_header(entries, order))
    places = [first + sum(len(strip) for strip in strips[:i]) for i in range(len(strips))]
    return _header(entries | {273: (4, places)}, order) + b"".join(strips)


def _header(entries: dict[int, Tag], order: str) -> bytes:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    fields, far = [mark + struct.pack(order + "IH", 8, len(entries))], b""
    start = 8 + 2 + 12 * len(entries) + 4
    for number, (kind, values) in sorted(entries.items()):
        if isinstance(values, bytes):
            content = values
        else:
            content = struct.pack(f"{order}{len(values)}{_SIZES[kind]}", *values)
        fields.append(struct.pack(order + "HHI", number, kind, len(values)))
        if len(content) <= 4:
            fields.append(content.ljust(4, b"\0"))
        else:
            fields.append(struct.pack(order + "I", start + len(far)))
            far += content + b"\0" * (len(content) % 2)
    return b"".join(fields) + struct.pack(order + "I", 0) + far


def jpeg2000(values: np.ndarray, bits: int) -> bytes:
    """Return values [H, W] as a lossless JPEG 2000 codestream of `bits`. Pillow writes 8 or 16; the header is patched."""
    full = 16 if bits > 8 else 8
    shifted = values.astype(np.int64) + (1 << full - 1) - (1 << bits - 1)
    pixels = shifted.astype(np.uint16 if full == 16 else np.uint8)
    data = bytearray(encode(Image.fromarray(pixels), "JPEG2000", no_jp2=True))
    assert data[42] == full - 1
    data[42] = bits - 1
    return bytes(data)


def sgi(values: np.ndarray) -> bytes:
    """Return 16-bit grey values [H, W] as an SGI file."""
    height, width = values.shape
    header = struct.pack(">hBBHHHHii", 474, 0, 2, 2, width, height, 1, 0, 65535)
    return header.ljust(512, b"\0") + values[::-1].astype(">u2").tobytes()


def change_jpeg(data: bytes, marker: int, change: Callable[[bytes], bytes]) -> bytes:
    """Return a JPEG file with its first segment of this marker changed. `change` gets and returns length and content."""
    place = 2
    while data[place + 1] != marker:
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return data[: place + 2] + change(data[place + 2 : end]) + data[end:]
