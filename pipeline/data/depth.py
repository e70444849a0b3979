"""Samples that aren't 0 to 255 brought there, by what the file says of their range; what says nothing is refused."""

import io
import struct
import sys
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from pipeline.data.formats import DecodeError

GAP = 3.0  # so many times the pixels that are wanted are enough for antialiasing
_WHITE = 65535  # of sixteen bits
_DARK = 4095  # the largest value of twelve bits; sixteen bits that never exceed it may be twelve
_FEW = 8  # different values
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# Pillow takes libtiff's samples, which have the machine's byte order, for the file's.
_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_TOO_DARK = f"16-bit values that never exceed {_DARK}, and nothing in the file says what white is"
_CODESTREAM = b"\xff\x4f\xff\x51"


def opened(kind: str, data: bytes, at_least: int = 0) -> ImageFile.ImageFile:
    """A file of a known format, its header read; raises whatever Pillow raises.

    Args:
        at_least: see `images.open_image`.
    """
    image = Image.OPEN[kind][0](io.BytesIO(data), "")
    if at_least and kind == "JPEG":
        image.draft(None, (int(GAP * at_least), int(GAP * at_least)))
    return image


def load(kind: str, data: bytes, image: ImageFile.ImageFile) -> Image.Image:
    """The pixels of an image that was opened.

    Returns:
        an image of eight bits a sample: any mode but I, F and I;16.

    Raises:
        DecodeError: nothing says what range the values have, or they are outside it.
    """
    if read := _READERS.get(kind):
        return read(data, image)
    image.load()
    if image.mode in _DEEP:
        raise DecodeError(f"{kind} of more than 8 bits, and nothing in the file says what white is")
    return image


def png_chunks(data: bytes, place: int = 8) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of the chunks of a PNG file, as their lengths say."""
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        yield kind, data[place + 8 : place + 8 + size]
        place += 12 + size


def component_bits(data: bytes) -> list[tuple[int, bool]]:
    """Bits of each component of a JPEG 2000 file, and whether it is signed."""
    start = data.find(_CODESTREAM)
    (count,) = struct.unpack_from(">H", data, start + 40)
    return [((data[start + i] & 0x7F) + 1, data[start + i] > 0x7F) for i in range(42, 42 + 3 * count, 3)]


def _to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values from `low` to `high` as uint8 0 to 255.

    Raises:
        DecodeError: some are outside.
    """
    if (low, high) == (0, _WHITE) and values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values // 257).astype(np.uint8)
    least, most = float(values.min()), float(values.max())
    slack = 1e-6 * (high - low)
    if least < low - slack or most > high + slack:
        raise DecodeError(f"values from {least:g} to {most:g}, where the file says {low:g} to {high:g}")
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.clip(scaled + 0.5, 0, 255).astype(np.uint8)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def _png(data: bytes, image: ImageFile.ImageFile) -> Image.Image:
    if data[12:16] != b"IHDR":
        raise DecodeError("PNG that doesn't begin with its header")
    depth, colour = data[24], data[25]
    if depth == 16:
        return _deep_png(data, image, colour)
    image.load()
    if colour in (0, 2) and "transparency" in image.info and depth > 1:
        # Pillow scales samples of two and four bits, but not the one that is transparent.
        top, key = (1 << depth) - 1, image.info["transparency"]
        keys = tuple((k & top) * 255 // top for k in (key if isinstance(key, tuple) else (key,)))
        image.info["transparency"] = keys if colour == 2 else keys[0]
    if depth != 8 or colour == 3 or not (bits := _significant_bits(data, colour, 8)):
        return image
    flat = image.convert(image.mode + "A") if "transparency" in image.info else image
    values = np.asarray(flat)
    return _image(_by_bits(values[..., None] if values.ndim == 2 else values, bits, 8))


def _significant_bits(data: bytes, colour: int, depth: int) -> tuple[int, ...]:
    """What the sBIT chunk says of each channel; empty where there is none of use."""
    if data.find(b"sBIT", 0, data.find(b"IDAT")) < 0:
        return ()
    for kind, content in png_chunks(data):
        if kind == b"sBIT":
            fits = len(content) == {0: 1, 2: 3, 4: 2, 6: 4}[colour]
            return tuple(content) if fits and all(0 < bits <= depth for bits in content) else ()
        if kind == b"IDAT":
            break
    return ()


def _by_bits(values: np.ndarray, bits: tuple[int, ...], depth: int) -> np.ndarray:
    """Values [H, W, C] of which so many bits are significant, as uint8.

    The format wants them spread over the whole range, their bits on top. Writers that leave them at the bottom are
    told by small values whose lower bits are in use.
    """
    colours = values.shape[-1] - (values.shape[-1] in (2, 4))
    tops = np.array([(1 << b) - 1 for b in bits[:colours]])
    below = np.array([(1 << (depth - b)) - 1 for b in bits[:colours]])
    seen = values[..., :colours]
    spread = not seen.any() or bool((seen > tops).any()) or not below.any()
    if not spread and not (seen & below).any():
        spread = len(np.unique(seen)) > _FEW
        if not spread:
            raise DecodeError(
                f"values of {max(bits)} bits that may be the upper or the lower ones of {depth}"
            )
    if spread:
        return (values // (257 if depth == 16 else 1)).astype(np.uint8)
    scaled = [_to_bytes(values[..., i], 0, int(tops[i])) for i in range(colours)]
    if colours < values.shape[-1]:
        alpha = values[..., -1]
        top = (1 << bits[-1]) - 1
        scaled.append(_to_bytes(alpha, 0, top if alpha.max() <= top else (1 << depth) - 1))
    return np.stack(scaled, -1)


def _deep_png(data: bytes, image: ImageFile.ImageFile, colour: int) -> Image.Image:
    if colour == 0:
        image.load()
        values: np.ndarray = np.asarray(image)[..., None].astype(np.uint16)
    elif colour == 4:
        # Pillow has no name for pairs of sixteen bits: four bytes are as long.
        pairs = _load_as(image, "RGBA").astype(np.uint16)
        values = pairs[..., ::2] << 8 | pairs[..., 1::2]
    else:
        values = _both_bytes("PNG", data, image, f"{image.mode};16B")
    if bits := _significant_bits(data, colour, 16):
        pixels = _by_bits(values, bits, 16)
    else:
        pixels = _by_use(values, values.shape[-1] - (colour in (4, 6)))
    if "transparency" in image.info and colour in (0, 2):
        clear = (values == np.asarray(image.info["transparency"])).all(-1, keepdims=True)
        pixels = np.concatenate([pixels, np.where(clear, 0, 255)], -1).astype(np.uint8)
    return _image(pixels)


def _by_use(values: np.ndarray, colours: int) -> np.ndarray:
    """Values [H, W, C] of sixteen bits that use their range, as uint8; `colours` of the channels aren't alpha."""
    if 0 < values[..., :colours].max() <= _DARK:
        raise DecodeError(_TOO_DARK)
    return _to_bytes(values, 0, _WHITE)


def _load_as(image: ImageFile.ImageFile, layout: str) -> np.ndarray:
    """The pixels of an opened image, its bytes taken in another layout (Pillow's raw mode)."""
    image.tile = [
        tile._replace(args=(layout, *tile.args[1:]) if isinstance(tile.args, tuple) else layout)
        for tile in image.tile
    ]
    image.load()
    return np.asarray(image)


def _both_bytes(kind: str, data: bytes, image: ImageFile.ImageFile, layout: str) -> np.ndarray:
    """Colours of sixteen bits, [H, W, C]: Pillow gives one byte of each, and the other one at a second reading."""
    other = layout[:-1] + _OTHER_BYTE[layout[-1]]
    upper = _load_as(image, layout).astype(np.uint16)
    return upper << 8 | _load_as(opened(kind, data), other)


def _tiff(data: bytes, image: ImageFile.ImageFile) -> Image.Image:
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    tags = image.tag_v2
    bits = int(max(_numbers(tags, 258) or [1]))
    signed = max(_numbers(tags, 339) or [1]) == 2
    tile = image.tile[0]
    layout = tile.args[0] if isinstance(tile.args, tuple) else str(tile.args)
    planes = tags.get(284) == 2 and len(image.getbands()) > 1
    if planes and (bits == 16 or image.mode in ("LA", "La", "PA", "LAB")):
        raise DecodeError(f"TIFF of {bits}-bit {image.mode} in planes, which Pillow can't read")
    sizes = _numbers(tags, 279) or _numbers(tags, 325)
    if image.mode == "YCbCr" and 0 < sum(sizes) < 3 * image.width * image.height:
        raise DecodeError("TIFF of uncompressed colours at half the size, which Pillow can't read")
    if image.mode == "P" and 0 < max(_numbers(tags, 320) or [0]) < 256:
        raise DecodeError("TIFF with a colour map of values below 256, where white is 65535")
    if ";16" in layout and image.mode in ("RGB", "RGBA", "CMYK"):
        return _deep_tiff(data, image, layout)
    if tile.codec_name == "libtiff" and layout in _NATIVE:
        _load_as(image, _NATIVE[layout])
    image.load()
    if image.mode not in _DEEP and not signed:
        return image
    values = np.asarray(image)
    if signed and bits == 8:
        values = values.view(np.int8)
    elif bits == 32 and values.dtype == np.int32 and not signed:
        values = values.view(np.uint32)
    if not np.isfinite(values).all():
        raise DecodeError("values that are no numbers, or infinite")
    if (limits := _tiff_range(tags, signed)) is None and bits < 16 and not signed:
        limits = 0, (1 << bits) - 1
    if limits is not None:
        pixels = _to_bytes(values, *limits)[..., None]
    elif bits == 16 and not signed:
        pixels = _by_use(values[..., None], 1)
    else:
        what = "floating-point" if image.mode == "F" else f"signed {bits}-bit" if signed else f"{bits}-bit"
        raise DecodeError(f"{what} values, and nothing in the file says what black and white are")
    # Pillow turns these over only up to eight bits.
    return _image(255 - pixels if tags.get(262, 0) == 0 else pixels)


def _deep_tiff(data: bytes, image: TiffImagePlugin.TiffImageFile, layout: str) -> Image.Image:
    mode, tags = image.mode, image.tag_v2
    # Pillow would divide by alpha before there is a range.
    values = _both_bytes("TIFF", data, image, layout.replace("RGBa", "RGBA"))
    colours = values.shape[-1] - (mode == "RGBA")
    if limits := _tiff_range(tags, signed=False):
        scaled = [_to_bytes(values[..., :colours], *limits)]
        if mode == "RGBA":
            alpha = values[..., 3:]
            scaled.append(_to_bytes(alpha, 0, limits[1] if alpha.max() <= limits[1] else _WHITE))
        pixels = np.concatenate(scaled, -1)
    else:
        pixels = _by_use(values, colours)
    if mode == "CMYK":
        return Image.frombytes(mode, image.size, pixels.tobytes())
    if layout.startswith("RGBa"):
        return Image.frombytes("RGBa", image.size, pixels.tobytes()).convert("RGBA")
    return _image(pixels)


def _numbers(tags: TiffImagePlugin.ImageFileDirectory_v2, tag: int) -> list[float]:
    """The values of a tag; empty where it is absent or holds no numbers."""
    value = tags.get(tag, ())
    try:
        return [float(v) for v in (value if isinstance(value, tuple) else (value,))]
    except (TypeError, ValueError, ZeroDivisionError):
        return []


def _tiff_range(tags: TiffImagePlugin.ImageFileDirectory_v2, signed: bool) -> tuple[float, float] | None:
    """The least and the largest value as the tags for them say, or None; the least is 0 unless it is said."""
    high = _numbers(tags, 341) or _numbers(tags, 281)
    low = _numbers(tags, 340) or _numbers(tags, 280)
    if not high or (signed and not low):
        return None
    limits = min(low, default=0.0), max(high)
    return limits if np.isfinite(limits).all() and limits[0] < limits[1] else None


def _ppm(data: bytes, image: ImageFile.ImageFile) -> Image.Image:
    tile = image.tile[0]
    image.load()
    if image.mode == "F":
        raise DecodeError("floating-point values, and nothing in the file says what black and white are")
    if image.mode != "I":
        return image
    values = np.asarray(image)
    # Pillow has brought them to sixteen bits, where they had a range of their own.
    whole = tile.codec_name == "raw" or not isinstance(tile.args, tuple) or tile.args[-1] == _WHITE
    return _image((values // 257 if whole else (values * 255 + 32767) // _WHITE)[..., None].astype(np.uint8))


def _jpeg2000(data: bytes, image: ImageFile.ImageFile) -> Image.Image:
    components = component_bits(data)
    image.load()
    if any(signed for _, signed in components):
        raise DecodeError("JPEG 2000 of signed values, and nothing in the file says what black and white are")
    bits = [bits for bits, _ in components]
    if image.mode in _DEEP:
        # Pillow has moved them to the upper ones of sixteen bits.
        values = np.asarray(image).astype(np.uint16)[..., None]
        return _image(
            _by_use(values, 1)
            if bits[0] >= 16
            else _to_bytes(values >> (16 - bits[0]), 0, (1 << bits[0]) - 1)
        )
    if image.mode.startswith("P") or all(b == 8 for b in bits):
        return image
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    if max(bits) >= 16 and values[..., : 3 if len(bits) > 2 else 1].max() <= _DARK >> 8:
        raise DecodeError(_TOO_DARK)
    tops = [255 >> (8 - b) << (8 - b) if b < 8 else 255 for b in bits[: values.shape[-1]]]
    pixels = np.stack([_to_bytes(values[..., i], 0, top) for i, top in enumerate(tops)], -1)
    return Image.frombytes(image.mode, image.size, pixels.tobytes())


def _sgi(data: bytes, image: ImageFile.ImageFile) -> Image.Image:
    image.load()
    # Pillow gives the upper byte alone.
    if data[3] == 2 and np.asarray(image).max() <= _DARK >> 8 and any(data[512:]):
        raise DecodeError(_TOO_DARK)
    return image


_READERS: dict[str, Callable[[bytes, ImageFile.ImageFile], Image.Image]] = {
    "PNG": _png, "TIFF": _tiff, "PPM": _ppm, "JPEG2000": _jpeg2000, "SGI": _sgi,
}  # fmt: skip
