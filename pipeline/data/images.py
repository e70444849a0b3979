"""From an encoded image to pixels, and back."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000
_MODES = {1: "L", 3: "RGB"}
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")


class DecodeError(ValueError):
    """These bytes are no image that can be used: says why."""


def decode(
    data: bytes,
    size: int,
    channels: int,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    crop: tuple[float, float] = (0.5, 0.5),
) -> np.ndarray:
    """Any image that Pillow opens, at a fixed size.

    Palettes, transparency (composited on `background`), 16-bit, CMYK, EXIF rotation; of an animation the first
    frame. The shorter side is resized to `size` with antialiasing, the longer one cropped.

    Args:
        channels: 1 or 3.
        crop: where the square is cut, from 0 to 1 in x and y; (0.5, 0.5) is the centre.

    Returns:
        uint8 [size, size, channels].

    Raises:
        DecodeError: empty, truncated, undecodable, or of more than `MAX_PIXELS` pixels.
    """
    image = open_image(data, background)
    if image.mode != _MODES[channels]:
        image = image.convert(_MODES[channels])
    if image.size != (size, size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) * crop[0], (height - side) * crop[1]
        image = image.resize(
            (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side), reducing_gap=3.0
        )
    return np.asarray(image, dtype=np.uint8).reshape(size, size, channels)


def open_image(data: bytes, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """An image as mode L or RGB, upright, at its own size; raises DecodeError as `decode`."""
    if not data:
        raise DecodeError("empty")
    try:
        with warnings.catch_warnings():
            # Pillow only warns of a decompression bomb up to twice its limit: the size is checked here.
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise DecodeError(
                    f"{image.width}x{image.height} pixels, more than {MAX_PIXELS} (decompression bomb)"
                )
            image.load()
            if image.getexif().get(0x0112, 1) != 1:
                image = ImageOps.exif_transpose(image)
            return _plain(image, background)
    except DecodeError:
        raise
    except Exception as error:  # Pillow's plug-ins raise anything on damaged input
        raise DecodeError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


def _plain(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in _SIXTEEN_BITS:
        values = np.asarray(image.convert("I"), np.int64)
        return Image.fromarray((np.clip(values, 0, 65535) // 257).astype(np.uint8))
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, C] as PNG: the same bytes for the same pixels."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False, compress_level=6)
    return buffer.getvalue()
