"""Scales samples of any range to 0..255, and reads layouts that Pillow handles only partly; for all formats."""

import io
import sys

import numpy as np
from PIL import Image, ImageFile

from pipeline.data.formats import DecodeError

GAP = 3.0  # pixels to decode a side, as a multiple of those wanted: enough for antialiasing
WHITE = 65535  # largest value of sixteen bits
DARK = 4095  # the largest value of twelve bits; sixteen bits that never exceed it may be twelve
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
TOO_DARK = f"16-bit values that never exceed {DARK}, and nothing in the file says what white is"
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def opened(kind: str, data: bytes, at_least: int = 0) -> ImageFile.ImageFile:
    """Opens a file of a known format and reads its header. Raises whatever Pillow raises.

    Args:
        at_least: see `images.open_image`.
    """
    image = Image.OPEN[kind][0](io.BytesIO(data), "")
    if at_least and kind == "JPEG":
        image.draft(None, (int(GAP * at_least), int(GAP * at_least)))
    return image


def to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scales values in [low, high] to uint8 0..255.

    Raises:
        DecodeError: some values are outside.
    """
    if (low, high) == (0, WHITE) and values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values // 257).astype(np.uint8)
    least, most = float(values.min()), float(values.max())
    slack = 1e-6 * (high - low)
    if least < low - slack or most > high + slack:
        raise DecodeError(f"values from {least:g} to {most:g}, where the file says {low:g} to {high:g}")
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.clip(scaled + 0.5, 0, 255).astype(np.uint8)


def as_image(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] as a Pillow image."""
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def by_use(values: np.ndarray, colours: int) -> np.ndarray:
    """Scales 16-bit values [H, W, C] to uint8 if they use their range.

    Args:
        colours: number of channels that are not alpha.

    Raises:
        DecodeError: the values never exceed twelve bits, so white is unknown.
    """
    if 0 < values[..., :colours].max() <= DARK:
        raise DecodeError(TOO_DARK)
    return to_bytes(values, 0, WHITE)


def load_as(image: ImageFile.ImageFile, layout: str) -> np.ndarray:
    """The pixels of an opened image, with its bytes read in another layout (one of Pillow's raw modes)."""
    image.tile = [
        tile._replace(args=(layout, *tile.args[1:]) if isinstance(tile.args, tuple) else layout)
        for tile in image.tile
    ]
    image.load()
    return np.asarray(image)


def both_bytes(kind: str, data: bytes, image: ImageFile.ImageFile, layout: str) -> np.ndarray:
    """16-bit colours [H, W, C]. Pillow gives only one byte of each sample, so the image is read twice."""
    other = layout[:-1] + _OTHER_BYTE[layout[-1]]
    upper = load_as(image, layout).astype(np.uint16)
    return upper << 8 | load_as(opened(kind, data), other)
