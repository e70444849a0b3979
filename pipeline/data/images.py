"""Decodes an encoded image to pixels, and encodes pixels as PNG."""

import io
import re
import warnings

import numpy as np
from PIL import Image, features

from pipeline.data import damage, depth, scaling
from pipeline.data.formats import FORMATS, DecodeError, sniff, told_by_all
from pipeline.data.plain import plain_pixels
from pipeline.redact import one_line

__all__ = ["FORMATS", "DecodeError", "Encoded", "decode", "encode_png", "fit", "open_image", "sniff"]

MAX_PIXELS = 64_000_000
Encoded = (
    bytes | np.ndarray
)  # the bytes of an image file, or its pixels: uint8 [H, W, C] of 1, 3 or 4 channels
Colour = tuple[int, int, int]
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ROTATING_FORMATS = {"TIFF", "MPO"}
_ROTATING_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Formats that some builds of Pillow lack.
_CODECS = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "PNG": "zlib", "WEBP": "webp"}
_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>|\b0x[0-9a-fA-F]{8,}")

Image.init()
# Pillow warns of damaged metadata, and of decompression bombs only above twice `MAX_PIXELS`, which is checked here.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(
    data: Encoded,
    size: int,
    channels: int,
    *,
    background: Colour = (255, 255, 255),
    crop: tuple[float, float] = (0.5, 0.5),
) -> np.ndarray:
    """Decodes an image of any format in `FORMATS` to a square of fixed size.

    Resolves palettes, transparency, 16-bit samples, CMYK and EXIF rotation. Takes the first frame of an animation.
    Resizes the shorter side to `size` with antialiasing and crops the longer side.

    Args:
        size: width and height of the result, in pixels.
        channels: 1, 3 or 4; the fourth is alpha. With 1 or 3, transparent pixels show `background`.
        background: red, green and blue, 0 to 255.
        crop: place of the square, from 0 to 1 in x and y; (0.5, 0.5) is the centre.

    Returns:
        uint8 [size, size, channels].

    Raises:
        DecodeError: the data is empty, truncated or undecodable, the range of its values is unknown, or it has more
            than `MAX_PIXELS` pixels.
    """
    data = _unpacked(data, size)
    if isinstance(data, np.ndarray) and data.shape == (size, size, channels) and data.dtype == np.uint8:
        return data
    image = _open(data, size, channels, background)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) * crop[0], (height - side) * crop[1]
    return _resize(image, (size, size), (left, top, left + side, top + side))


def fit(data: Encoded, size: int, channels: int, background: Colour = (255, 255, 255)) -> np.ndarray:
    """As `decode`, but without the crop: uint8 [H, W, channels] whose shorter side is `size`."""
    image = _open(_unpacked(data, size), size, channels, background)
    width, height = image.size
    scale = size / min(width, height)
    scaled = round(width * scale), round(height * scale)
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise DecodeError(
            f"{width}x{height} pixels, {scaled[0]}x{scaled[1]} when resized: more than {MAX_PIXELS}"
        )
    return _resize(image, scaled, (0, 0, width, height))


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    if box != (0, 0, *size):
        # Pillow premultiplies colours by alpha while it resizes, where there is alpha.
        image = image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=scaling.GAP)
    elif image.size != size:
        image = image.crop((0, 0, *size))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _open(data: Encoded, size: int, channels: int, background: Colour) -> Image.Image:
    image = _flat(_as_image(data, size), background, alpha=channels == 4)
    return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])


def open_image(
    data: Encoded, background: Colour = (255, 255, 255), at_least: int = 0, *, alpha: bool = False
) -> Image.Image:
    """Opens an image as mode L or RGB, upright. Raises DecodeError as `decode` does.

    Args:
        at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, if each side keeps at least
            three times this many pixels, enough for antialiasing; 0 = full size.
        alpha: keep an image with transparency as mode RGBA, instead of showing the background.
    """
    return _flat(_as_image(_unpacked(data, at_least), at_least), background, alpha)


def _as_image(data: Encoded, at_least: int) -> Image.Image:
    return _from_pixels(data) if isinstance(data, np.ndarray) else _from_file(data, at_least)


def _flat(image: Image.Image, background: Colour, alpha: bool) -> Image.Image:
    if alpha or image.mode != "RGBA":
        return image
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(canvas, image).convert("RGB")


def _unpacked(data: Encoded, at_least: int) -> Encoded:
    """The pixels of a plain file (see plain.py); anything else is returned unchanged."""
    pixels = None if isinstance(data, np.ndarray) else plain_pixels(data, at_least, MAX_PIXELS)
    return data if pixels is None else pixels


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in _MODES:
        raise DecodeError(f"{pixels.dtype} {list(pixels.shape)}, not uint8 [H, W, C] of 1, 3 or 4 channels")
    if not pixels.size:
        raise DecodeError("empty")
    _check_size(pixels.shape[1], pixels.shape[0])
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def _from_file(data: bytes, at_least: int) -> Image.Image:
    """Decodes a file to mode L, RGB or RGBA. A broken file is repaired if its pixels are complete."""
    if not data:
        raise DecodeError("empty")
    kind = told_by_all(data)
    if kind is None:
        raise DecodeError("UnidentifiedImageError: not a known image format")
    if kind not in FORMATS:
        raise DecodeError(f"{kind}, which Pillow can't decode here")
    try:
        return _read(kind, data, at_least)
    except DecodeError:
        raise
    except Exception as error:  # Pillow's plug-ins raise anything on damaged input
        reason = _words(kind, error)
    mended = damage.repaired(kind, data)
    if mended is not None:
        try:
            return _read(kind, mended, at_least)
        except DecodeError:
            raise
        except Exception:
            pass  # the first error says best what is wrong
    raise DecodeError(reason)


def _words(kind: str, error: Exception) -> str:
    """The reason why an image can't be read, in words that don't change from run to run (no memory addresses)."""
    if kind not in Image.OPEN or (kind in _CODECS and not features.check(_CODECS[kind])):
        return f"{kind}, which this Pillow lacks"
    return one_line(_OBJECT.sub("it", f"{kind}, {type(error).__name__}: {error}"))


def _read(kind: str, data: bytes, at_least: int) -> Image.Image:
    file = scaling.opened(kind, data, at_least)
    _check_size(file.width, file.height)
    image = depth.load(kind, data, file)
    _check_size(image.width, image.height)  # the size of an icon is known only after loading
    damage.check_whole(kind, data, image, at_least)
    # Checked only where there can be an orientation, because it costs a third of decoding a small image.
    if file.format in _ROTATING_FORMATS or _ROTATING_KEYS & file.info.keys():
        image = _upright(image, file)
    return _plain(image)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} pixels, more than {MAX_PIXELS} (decompression bomb)")


def _upright(image: Image.Image, file: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(file.getexif().get(_ORIENTATION, 1))
    except Exception:  # the metadata is broken, the image is good
        turn = None
    return image if turn is None else image.transpose(turn)


def _plain(image: Image.Image) -> Image.Image:
    """Converts an image of eight bits a sample to mode L, RGB or RGBA."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode == "1" else "RGB")


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, C] of 1, 3 or 4 channels as PNG. Equal pixels give equal bytes."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False, compress_level=6)
    return buffer.getvalue()
