"""From an encoded image to pixels, and back."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from pipeline.redact import one_line

MAX_PIXELS = 64_000_000
_MODES = {1: "L", 3: "RGB"}
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_GAP = 3.0
_ROTATING_FORMATS = {"TIFF", "MPO"}
_ROTATING_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}

# The common formats are tried first. PostScript is left out: Pillow would run Ghostscript on what is in the file.
Image.preinit()
Image.init()
_FORMATS = [name for name in Image.ID if name != "EPS"]
# Pillow warns of damaged metadata, and of a decompression bomb only from twice our limit on, which is checked here.
warnings.filterwarnings("ignore", module=r"PIL\.")


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
    """Any image that Pillow opens, as a square of fixed size.

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
    image = _open(data, size, channels, background)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) * crop[0], (height - side) * crop[1]
    return _resize(image, (size, size), (left, top, left + side, top + side))


def fit(
    data: bytes, size: int, channels: int, background: tuple[int, int, int] = (255, 255, 255)
) -> np.ndarray:
    """As `decode`, but nothing is cut off: uint8 [H, W, channels] whose shorter side is `size`."""
    image = _open(data, size, channels, background)
    width, height = image.size
    scale = size / min(width, height)
    return _resize(image, (round(width * scale), round(height * scale)), (0, 0, width, height))


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    if box != (0, 0, *size):
        image = image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=_GAP)
    elif image.size != size:
        image = image.crop((0, 0, *size))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _open(data: bytes, size: int, channels: int, background: tuple[int, int, int]) -> Image.Image:
    image = open_image(data, background, at_least=size)
    return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])


def open_image(
    data: bytes, background: tuple[int, int, int] = (255, 255, 255), at_least: int = 0
) -> Image.Image:
    """An image as mode L or RGB, upright; raises DecodeError as `decode`.

    Args:
        at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as each side keeps
            three times so many pixels, for antialiasing; 0 = at its own size.
    """
    if not data:
        raise DecodeError("empty")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise DecodeError(
                f"{image.width}x{image.height} pixels, more than {MAX_PIXELS} (decompression bomb)"
            )
        if at_least:
            image.draft(None, (int(_GAP * at_least), int(_GAP * at_least)))
        image.load()
        # Asked for only where there can be an orientation: it costs a third of decoding a small image.
        may_rotate = image.format in _ROTATING_FORMATS or _ROTATING_KEYS & image.info.keys()
        if may_rotate and image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return _plain(image, background)
    except DecodeError:
        raise
    except Exception as error:  # Pillow's plug-ins raise anything on damaged input
        raise DecodeError(one_line(f"{type(error).__name__}: {error}")) from None


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
