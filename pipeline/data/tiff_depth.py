"""Loads TIFF files, whose samples may have any type and range."""

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from pipeline.data.formats import DecodeError
from pipeline.data.scaling import DEEP, WHITE, as_image, both_bytes, by_use, load_as, to_bytes

# libtiff returns samples in the machine's byte order, but Pillow reads them in the file's order.
_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}


def load_tiff(data: bytes, image: ImageFile.ImageFile) -> Image.Image:
    """The pixels of an opened TIFF file, as `depth.load` returns them. Raises DecodeError as it does."""
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
        load_as(image, _NATIVE[layout])
    image.load()
    if image.mode not in DEEP and not signed:
        return image
    values = np.asarray(image)
    if signed and bits == 8:
        values = values.view(np.int8)
    elif bits == 32 and values.dtype == np.int32 and not signed:
        values = values.view(np.uint32)
    if not np.isfinite(values).all():
        raise DecodeError("values that are not finite")
    if (limits := _tiff_range(tags, signed)) is None and bits < 16 and not signed:
        limits = 0, (1 << bits) - 1
    if limits is not None:
        pixels = to_bytes(values, *limits)[..., None]
    elif bits == 16 and not signed:
        pixels = by_use(values[..., None], 1)
    else:
        what = "floating-point" if image.mode == "F" else f"signed {bits}-bit" if signed else f"{bits}-bit"
        raise DecodeError(f"{what} values, and nothing in the file says what black and white are")
    # Pillow inverts images whose 0 is white only up to eight bits.
    return as_image(255 - pixels if tags.get(262, 0) == 0 else pixels)


def _deep_tiff(data: bytes, image: TiffImagePlugin.TiffImageFile, layout: str) -> Image.Image:
    mode, tags = image.mode, image.tag_v2
    # Read premultiplied alpha as plain, because Pillow would divide by alpha before the range is known.
    values = both_bytes("TIFF", data, image, layout.replace("RGBa", "RGBA"))
    colours = values.shape[-1] - (mode == "RGBA")
    if limits := _tiff_range(tags, signed=False):
        scaled = [to_bytes(values[..., :colours], *limits)]
        if mode == "RGBA":
            alpha = values[..., 3:]
            scaled.append(to_bytes(alpha, 0, limits[1] if alpha.max() <= limits[1] else WHITE))
        pixels = np.concatenate(scaled, -1)
    else:
        pixels = by_use(values, colours)
    if mode == "CMYK":
        return Image.frombytes(mode, image.size, pixels.tobytes())
    if layout.startswith("RGBa"):
        return Image.frombytes("RGBa", image.size, pixels.tobytes()).convert("RGBA")
    return as_image(pixels)


def _numbers(tags: TiffImagePlugin.ImageFileDirectory_v2, tag: int) -> list[float]:
    """The values of a tag; empty if the tag is absent or holds no numbers."""
    value = tags.get(tag, ())
    try:
        return [float(v) for v in (value if isinstance(value, tuple) else (value,))]
    except (TypeError, ValueError, ZeroDivisionError):
        return []


def _tiff_range(tags: TiffImagePlugin.ImageFileDirectory_v2, signed: bool) -> tuple[float, float] | None:
    """The smallest and largest value that the tags state, or None; the smallest is 0 if only the largest is stated."""
    high = _numbers(tags, 341) or _numbers(tags, 281)
    low = _numbers(tags, 340) or _numbers(tags, 280)
    if not high or (signed and not low):
        return None
    limits = min(low, default=0.0), max(high)
    return limits if np.isfinite(limits).all() and limits[0] < limits[1] else None
