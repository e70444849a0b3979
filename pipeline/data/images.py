"""From an encoded image to pixels, and back."""

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
_GAP = 3.0
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
# Formats that Pillow may have been built without.
_CODECS = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "PNG": "zlib", "WEBP": "webp"}
_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>|\b0x[0-9a-fA-F]{8,}")

Image.init()
# Pillow warns of damaged metadata, and of a decompression bomb only from twice our limit on, which is checked here.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(
    data: Encoded,
    size: int,
    channels: int,
    *,
    background: Colour = (255, 255, 255),
    crop: tuple[float, float] = (0.5, 0.5),
) -> np.ndarray:
    """Any image of a format in `FORMATS`, as a square of fixed size.

    Palettes, transparency, 16 bits, CMYK and EXIF rotation are resolved; of an animation the first frame is taken. The
    shorter side is resized to `size` with antialiasing, the longer one cropped.

    Args:
        channels: 1, 3 or 4; the fourth one is alpha. With 1 or 3 what is transparent shows `background`.
        crop: where the square is cut, from 0 to 1 in x and y; (0.5, 0.5) is the centre.

    Returns:
        uint8 [size, size, channels].

    Raises:
        DecodeError: empty, truncated, undecodable, of values whose range nothing tells, or of more than `MAX_PIXELS`
            pixels.
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
    """As `decode`, but nothing is cut off: uint8 [H, W, channels] whose shorter side is `size`."""
    image = _open(_unpacked(data, size), size, channels, background)
    width, height = image.size
    scale = size / min(width, height)
    return _resize(image, (round(width * scale), round(height * scale)), (0, 0, width, height))


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    if box != (0, 0, *size):
        # Pillow weighs colours by alpha where there is one.
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
    """An image as mode L or RGB, upright; raises DecodeError as `decode`.

    Args:
        at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as each side keeps
            three times so many pixels, for antialiasing; 0 = at its own size.
        alpha: an image with transparency stays mode RGBA, and does not show the background.
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
    """The pixels of a plain file; what else is given as it is."""
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
    """An image of mode L, RGB or RGBA; a file that can't be read is repaired, if its pixels are whole."""
    if not data:
        raise DecodeError("empty")
    kind = told_by_all(data)
    if kind is None:
        raise DecodeError("UnidentifiedImageError: no image format that is known")
    if kind not in FORMATS:
        raise DecodeError(f"{kind}, which this Pillow can't decode")
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
            pass  # the first reason is nearer to what is wrong
    raise DecodeError(reason)


def _words(kind: str, error: Exception) -> str:
    """What is wrong with an image; the same words at every run."""
    if kind not in Image.OPEN or (kind in _CODECS and not features.check(_CODECS[kind])):
        return f"{kind}, which this Pillow lacks"
    return one_line(_OBJECT.sub("it", f"{kind}, {type(error).__name__}: {error}"))


def _read(kind: str, data: bytes, at_least: int) -> Image.Image:
    file = scaling.opened(kind, data, at_least)
    _check_size(file.width, file.height)
    image = depth.load(kind, data, file)
    _check_size(image.width, image.height)  # an icon tells its size once more
    damage.check_whole(kind, data, image, at_least)
    # Asked for only where there can be an orientation: it costs a third of decoding a small image.
    if file.format in _ROTATING_FORMATS or _ROTATING_KEYS & file.info.keys():
        image = _upright(image, file)
    return _plain(image)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} pixels, more than {MAX_PIXELS} (decompression bomb)")


def _upright(image: Image.Image, file: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(file.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata, of a good image
        turn = None
    return image if turn is None else image.transpose(turn)


def _plain(image: Image.Image) -> Image.Image:
    """An image of eight bits as mode L, RGB or RGBA."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode == "1" else "RGB")


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, C] of 1, 3 or 4 channels as PNG: the same bytes for the same pixels."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False, compress_level=6)
    return buffer.getvalue()
