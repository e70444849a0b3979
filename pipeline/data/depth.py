"""Scales samples to 0..255 by the range that the file states. A deep image without a stated range is refused."""

import struct
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageFile

from pipeline.data.formats import DecodeError
from pipeline.data.scaling import DARK, DEEP, TOO_DARK, WHITE, as_image, both_bytes, by_use, load_as, to_bytes
from pipeline.data.tiff_depth import load_tiff

_FEW = 8  # distinct values; fewer do not tell where the significant bits are
_CODESTREAM = b"\xff\x4f\xff\x51"


def load(kind: str, data: bytes, image: ImageFile.ImageFile) -> Image.Image:
    """The pixels of an opened image.

    Args:
        kind: format, a name of `formats.FORMATS`.
        data: the whole file.
        image: the file as Pillow opened it.

    Returns:
        an image of eight bits a sample, so of any mode but I, F and I;16.

    Raises:
        DecodeError: the file does not state the range of its values, or values lie outside it.
    """
    if read := _READERS.get(kind):
        return read(data, image)
    image.load()
    if image.mode in DEEP:
        raise DecodeError(f"{kind} of more than 8 bits, and nothing in the file says what white is")
    return image


def png_chunks(data: bytes, place: int = 8) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each chunk of a PNG file from `place` on, found by the chunks' lengths."""
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        yield kind, data[place + 8 : place + 8 + size]
        place += 12 + size


def component_bits(data: bytes) -> list[tuple[int, bool]]:
    """Bits of each component of a JPEG 2000 file, and True if the component is signed."""
    start = data.find(_CODESTREAM)
    (count,) = struct.unpack_from(">H", data, start + 40)
    return [((data[start + i] & 0x7F) + 1, data[start + i] > 0x7F) for i in range(42, 42 + 3 * count, 3)]


def _png(data: bytes, image: ImageFile.ImageFile) -> Image.Image:
    if data[12:16] != b"IHDR":
        raise DecodeError("PNG that doesn't begin with its header")
    depth, colour = data[24], data[25]
    if depth == 16:
        return _deep_png(data, image, colour)
    image.load()
    if colour in (0, 2) and "transparency" in image.info and depth > 1:
        # Pillow scales samples of two and four bits to eight, but not the transparent value.
        top, key = (1 << depth) - 1, image.info["transparency"]
        keys = tuple((k & top) * 255 // top for k in (key if isinstance(key, tuple) else (key,)))
        image.info["transparency"] = keys if colour == 2 else keys[0]
    if depth != 8 or colour == 3 or not (bits := _significant_bits(data, colour, 8)):
        return image
    flat = image.convert(image.mode + "A") if "transparency" in image.info else image
    values = np.asarray(flat)
    return as_image(_by_bits(values[..., None] if values.ndim == 2 else values, bits, 8))


def _significant_bits(data: bytes, colour: int, depth: int) -> tuple[int, ...]:
    """Significant bits of each channel from the sBIT chunk; empty without a valid chunk."""
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
    """Values [H, W, C] with `bits` significant bits a channel, as uint8.

    The PNG standard puts the significant bits on top, with the values spread over the whole range. Some writers leave
    them at the bottom instead. Those files are recognised by small values that use the lower bits.

    Raises:
        DecodeError: the values fit both layouts.
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
    scaled = [to_bytes(values[..., i], 0, int(tops[i])) for i in range(colours)]
    if colours < values.shape[-1]:
        alpha = values[..., -1]
        top = (1 << bits[-1]) - 1
        scaled.append(to_bytes(alpha, 0, top if alpha.max() <= top else (1 << depth) - 1))
    return np.stack(scaled, -1)


def _deep_png(data: bytes, image: ImageFile.ImageFile, colour: int) -> Image.Image:
    if colour == 0:
        image.load()
        values: np.ndarray = np.asarray(image)[..., None].astype(np.uint16)
    elif colour == 4:
        # Pillow has no mode for pairs of sixteen bits, so the four bytes are read as RGBA.
        pairs = load_as(image, "RGBA").astype(np.uint16)
        values = pairs[..., ::2] << 8 | pairs[..., 1::2]
    else:
        values = both_bytes("PNG", data, image, f"{image.mode};16B")
    if bits := _significant_bits(data, colour, 16):
        pixels = _by_bits(values, bits, 16)
    else:
        pixels = by_use(values, values.shape[-1] - (colour in (4, 6)))
    if "transparency" in image.info and colour in (0, 2):
        clear = (values == np.asarray(image.info["transparency"])).all(-1, keepdims=True)
        pixels = np.concatenate([pixels, np.where(clear, 0, 255)], -1).astype(np.uint8)
    return as_image(pixels)


def _ppm(data: bytes, image: ImageFile.ImageFile) -> Image.Image:
    tile = image.tile[0]
    image.load()
    if image.mode == "F":
        raise DecodeError("floating-point values, and nothing in the file says what black and white are")
    if image.mode != "I":
        return image
    values = np.asarray(image)
    # Pillow has scaled other ranges to sixteen bits.
    whole = tile.codec_name == "raw" or not isinstance(tile.args, tuple) or tile.args[-1] == WHITE
    return as_image((values // 257 if whole else (values * 255 + 32767) // WHITE)[..., None].astype(np.uint8))


def _jpeg2000(data: bytes, image: ImageFile.ImageFile) -> Image.Image:
    components = component_bits(data)
    image.load()
    if any(signed for _, signed in components):
        raise DecodeError("JPEG 2000 of signed values, and nothing in the file says what black and white are")
    bits = [bits for bits, _ in components]
    if image.mode in DEEP:
        # Pillow has shifted the values to the upper bits of sixteen.
        values = np.asarray(image).astype(np.uint16)[..., None]
        return as_image(
            by_use(values, 1) if bits[0] >= 16 else to_bytes(values >> (16 - bits[0]), 0, (1 << bits[0]) - 1)
        )
    if image.mode.startswith("P") or all(b == 8 for b in bits):
        return image
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    if max(bits) >= 16 and values[..., : 3 if len(bits) > 2 else 1].max() <= DARK >> 8:
        raise DecodeError(TOO_DARK)
    tops = [255 >> (8 - b) << (8 - b) if b < 8 else 255 for b in bits[: values.shape[-1]]]
    pixels = np.stack([to_bytes(values[..., i], 0, top) for i, top in enumerate(tops)], -1)
    return Image.frombytes(image.mode, image.size, pixels.tobytes())


def _sgi(data: bytes, image: ImageFile.ImageFile) -> Image.Image:
    image.load()
    # Pillow returns the upper byte only.
    if data[3] == 2 and np.asarray(image).max() <= DARK >> 8 and any(data[512:]):
        raise DecodeError(TOO_DARK)
    return image


_READERS: dict[str, Callable[[bytes, ImageFile.ImageFile], Image.Image]] = {
    "PNG": _png, "TIFF": load_tiff, "PPM": _ppm, "JPEG2000": _jpeg2000, "SGI": _sgi,
}  # fmt: skip
