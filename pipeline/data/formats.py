"""Recognises image formats by content: those that are decoded here, and those that are only named in errors."""

import re
from collections.abc import Callable


class DecodeError(ValueError):
    """The bytes are no usable image; the message says why."""


# Formats that Pillow decodes by itself. Left out: EPS (Pillow would run Ghostscript on the file's content), formats
# that Pillow only identifies (BUFR, GRIB, HDF5, MPEG, WMF), formats without a reliable signature (IM, IPTC, MCIDAS,
# SPIDER, PCD) and FITS, whose values have no stated range.
FORMATS = (
    "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FLI", "FTEX", "GBR", "GIF", "ICNS", "ICO", "JPEG",
    "JPEG2000", "MSP", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM",
    "XVTHUMB",
)  # fmt: skip

PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_TGA_END = b"TRUEVISION-XFILE.\0"
_STARTS = (
    (b"\xff\xd8\xff\xf7", "JPEG-LS"),
    (_JPEG, "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"8BPS\0\x01", "PSD"),
    (b"8BPS\0\x02", "PSB"),
    (b"qoif\0", "QOI"),
    (b"DDS \x7c\0\0\0", "DDS"),
    (b"\x59\xa6\x6a\x95", "SUN"),
    (b"\xb1\x68\xde\x3a", "DCX"),
    (b"\x80\xe8\0\0", "PIXAR"),
    (b"P7 332", "XVTHUMB"),
    (b"/* XPM */", "XPM"),
    # Recognised but not decoded.
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"P7\n", "PAM"),
    (b"gimp xcf ", "XCF"),
    (b"\xabKTX ", "KTX"),
    (b"SDPX\0", "DPX"),
    (b"\x80\x2a\x5f\xd7", "Cineon"),
    (b"\x8aMNG\r\n\x1a\n", "MNG"),
    (b"\x8bJNG\r\n\x1a\n", "JNG"),
    (b"BPG\xfb", "BPG"),
    (b"farbfeld\0", "farbfeld"),
    (b"\x97JB2\r\n\x1a\n", "JBIG2"),
    (b"AT&TFORM", "DjVu"),
    (b"SIMPLE  =", "FITS"),
    (b"IIU\0", "camera raw"),
    (b"IIRO\x08\0", "camera raw"),
    (b"IIRS\x08\0", "camera raw"),
    (b"FUJIFILMCCD-RAW", "camera raw"),
)
_TIFF = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
_BRANDS = {
    "AVIF": {b"avif", b"avis"},
    "HEIC": {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"},
    "camera raw": {b"crx "},
    "HEIF": {b"mif1", b"msf1"},
}
_BITMAP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_BITMAP_DEPTHS = (1, 2, 4, 8, 16, 24, 32)
# The magic number, then a size or a comment.
_PNM = re.compile(rb"P([1-6fF])\s+(#|\d+\s+(#|\d+(\s|#|$)))")
_XBM = re.compile(rb"\s*#define[ \t]+(\S*_)width[ \t]+\d+\s+#define[ \t]+(\S*)")
_SVG = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?((<!--.*?-->|<!DOCTYPE svg[^>]*>)\s*)*<svg[\s>]", re.S
)


def sniff(head: bytes) -> str | None:
    """The image format that a file's first bytes indicate.

    Args:
        head: at least the first 64 bytes, or the whole file if it is shorter.

    Returns:
        A name of `FORMATS`, or the name of a format that can't be decoded here, such as "HEIC" or "SVG"; None for
        anything else. A TGA file has its signature at its end, if at all: see `told_by_all`.
    """
    if head.startswith(PNG):
        return "PNG"
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    return next((told for test in _TESTS if (told := test(head))), None)


def told_by_all(data: bytes) -> str | None:
    """The format of a whole file: as `sniff`, and also TGA.

    TGA has no signature at its start. A file counts as TGA if it ends with the signature of version 2, or if its
    length is exactly what its header announces.
    """
    return sniff(data[:1024]) or ("TGA" if _is_tga(data) else None)


def _is_tga(data: bytes) -> bool:
    if len(data) < 18:
        return False
    mapped, kind, depth = data[1], data[2], data[16]
    entries, entry_bits = _number(data, 5, 2), data[7]
    width, height = _number(data, 12, 2), _number(data, 14, 2)
    if mapped > 1 or kind not in (1, 2, 3, 9, 10, 11) or depth not in (1, 8, 15, 16, 24, 32):
        return False
    if not width or not height or data[17] & 0xC0 or (not mapped and (entries or entry_bits)):
        return False
    pixels = width * height * ((depth + 7) // 8)
    return data.endswith(_TGA_END) or (
        kind <= 3 and len(data) == 18 + data[0] + entries * ((entry_bits + 7) // 8) + pixels
    )


def _number(data: bytes, place: int, size: int, order: str = "little") -> int:
    return int.from_bytes(data[place : place + size], order)  # type: ignore[arg-type]


def _tiff(head: bytes) -> str | None:
    if not head.startswith(_TIFF):
        return None
    return "camera raw" if head[8:10] == b"CR" else "TIFF"


def _riff(head: bytes) -> str | None:
    return "WEBP" if head.startswith(b"RIFF") and head[8:12] == b"WEBP" else None


def _iso_media(head: bytes) -> str | None:
    """The format by brands. The first brand names the file, the others list what it is compatible with."""
    if head[4:8] != b"ftyp":
        return None
    size = min(_number(head, 0, 4, "big"), len(head))
    brands = [head[8:12], *(head[i : i + 4] for i in range(16, size - 3, 4))]
    if not set().union(*_BRANDS.values()) & {brands[0]}:
        return None
    return next(kind for kind, some in _BRANDS.items() if some & set(brands))


def _bitmap(head: bytes) -> str | None:
    if head.startswith(b"BM") and _number(head, 14, 4) in _BITMAP_HEADERS:
        return "BMP"
    size = _number(head, 0, 4)
    at = 8 if size == 12 else 12  # offset of the number of planes
    if size not in _BITMAP_HEADERS or _number(head, at, 2) != 1:
        return None
    return "DIB" if _number(head, at + 2, 2) in _BITMAP_DEPTHS else None


def _icon(head: bytes) -> str | None:
    kind = {b"\0\0\1\0": "ICO", b"\0\0\2\0": "CUR"}.get(head[:4])
    count = _number(head, 4, 2)
    if not kind or not count or not _number(head, 14, 4) or _number(head, 18, 4) < 6 + 16 * count:
        return None
    return kind


def _small(head: bytes) -> str | None:
    """Formats with a short magic number; the rest of the header must fit too."""
    if len(head) < 16:
        return None
    if head.startswith(b"icns") and head[4] < 32:
        return "ICNS"
    if head.startswith((b"BLP1", b"BLP2")) and head[5 if head[3] == 0x31 else 7] == 0:
        return "BLP"
    if head.startswith(b"FTEX") and 0 in head[4:8]:
        return "FTEX"
    if head.startswith(b"\x01\xda") and head[2] < 2 and head[3] in (1, 2):
        return "SGI"
    if head[0] == 10 and head[1] in (0, 2, 3, 5) and head[2] < 2 and head[3] in (1, 2, 4, 8):
        return "PCX"
    if _number(head, 4, 2) in (0xAF11, 0xAF12) and _number(head, 14, 2) in (0, 3):
        return "FLI"
    if _number(head, 4, 4, "big") == 2 and head[20:24] == b"GIMP":
        return "GBR"
    if head.startswith((b"DanM", b"LinS")) and len(head) >= 32:
        total = 0
        for place in range(0, 32, 2):
            total ^= _number(head, place, 2)
        return None if total else "MSP"
    if head.startswith(b"\x01\0\0\0") and head[40:44] == b" EMF":
        return "EMF"
    if head.startswith(b"FORM") and head[8:12] in (b"ILBM", b"PBM "):
        return "ILBM"
    return "DICOM" if head[128:132] == b"DICM" else None


def _text(head: bytes) -> str | None:
    if pnm := _PNM.match(head):
        return "PFM" if pnm[1] == b"F" else "PPM"
    if (xbm := _XBM.match(head)) and (xbm[1] + b"height").startswith(xbm[2]):
        return "XBM"
    return "SVG" if _SVG.match(head) else None


_TESTS: tuple[Callable[[bytes], str | None], ...] = (
    _tiff, _riff, _iso_media, _bitmap, _icon, _small, _text,
)  # fmt: skip
