"""Decoding: every kind of image that Pillow opens is decoded; broken images and decompression bombs are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import DecodeError, decode, encode_png, fit, open_image
from tests.data.common import encode, picture

TRUE = picture(1, 16, 16)


def difference(pixels: np.ndarray, image: Image.Image = TRUE) -> float:
    return float(np.abs(pixels.astype(int) - np.asarray(image.convert("RGB")).astype(int)).mean())


@pytest.mark.parametrize(
    "kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG", "JPEG2000", "TGA", "ICO"]
)
def test_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    assert difference(decode(encode(TRUE, kind, **options), 16, 3)) < 6


def test_palettes_are_resolved() -> None:
    assert difference(decode(encode(TRUE.quantize(256)), 16, 3)) < 6


def test_cmyk_and_bilevel() -> None:
    assert difference(decode(encode(TRUE.convert("CMYK"), "JPEG", quality=95), 16, 3)) < 6
    assert set(np.unique(decode(encode(TRUE.convert("1")), 16, 1))) <= {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_chosen_background(mode: str) -> None:
    clear = Image.new("RGBA", (16, 16), (9, 9, 9, 0))
    options: dict[str, object] = {}
    image = clear
    if mode == "LA":
        image = clear.convert("LA")
    if mode == "P":
        image, options = Image.new("P", (16, 16), 0), {"transparency": 0}
    pixels = decode(encode(image, **options), 16, 3, background=(10, 200, 30))
    assert (pixels == (10, 200, 30)).all()


def test_half_transparency_is_mixed() -> None:
    pixels = decode(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 128))), 4, 3, background=(255, 255, 255))
    assert abs(int(pixels[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(kind: str) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = decode(encode(Image.fromarray(ramp), kind), 16, 1)[..., 0]
    assert np.abs(pixels.astype(int) - ramp // 257).max() == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_undone(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation 6: a viewer must turn it by 90 degrees clockwise
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 16, 8))
    pixels = decode(encode(image, kind, exif=exif), 16, 3)
    assert pixels[:, 12:].mean() > 250
    assert pixels[:, :4].mean() < 5


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [picture(i, 16, 16) for i in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert difference(decode(data, 16, 3), frames[0]) < 6


def test_crops_lie_where_they_are_asked_for() -> None:
    image = Image.new("RGB", (30, 10), (0, 0, 0))
    image.paste((255, 0, 0), (20, 0, 30, 10))
    data = encode(image)
    assert decode(data, 10, 3, crop=(1.0, 0.5))[..., 0].min() == 255
    assert decode(data, 10, 3, crop=(0.0, 0.5)).max() == 0
    assert decode(data, 10, 3).max() == 0


def test_fit_keeps_the_longer_side() -> None:
    assert fit(encode(picture(3, 60, 20)), 10, 3).shape == (10, 30, 3)
    assert fit(encode(picture(3, 20, 60)), 10, 1).shape == (30, 10, 1)
    with pytest.raises(DecodeError, match="20000x1 pixels, 2000000x100 when resized: more than 64000000"):
        fit(encode(picture(3, 20_000, 1)), 100, 3)


def test_resizing_is_antialiased() -> None:
    checks = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    for kind in ("PNG", "JPEG"):
        pixels = decode(encode(Image.fromarray(checks), kind), 32, 1).astype(int)
        assert np.abs(pixels - 127).max() <= 8


def test_a_large_jpeg_decoded_at_a_fraction_looks_the_same() -> None:
    large = picture(5, 1024, 768)
    data = encode(large, "JPEG", quality=95)
    whole = decode(encode(Image.open(io.BytesIO(data))), 32, 3)
    assert np.abs(decode(data, 32, 3).astype(int) - whole.astype(int)).mean() < 1.5


def test_png_round_trip_is_exact() -> None:
    for channels in (1, 3, 4):
        pixels = np.random.default_rng(0).integers(0, 256, (9, 9, channels), dtype=np.uint8)
        assert (decode(encode_png(pixels), 9, channels) == pixels).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_truncated_images_are_refused(kind: str) -> None:
    data = encode(picture(2, 64, 64), kind)
    for part in (0, 1, 10, len(data) // 2):
        with pytest.raises(DecodeError):
            decode(data[:part], 64, 3)


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_decompression_bombs_are_refused_before_they_unfold() -> None:
    for width, height in ((10_000, 10_000), (2**31 - 1, 2**31 - 1), (64_000_001, 1)):
        with pytest.raises(DecodeError, match=r"bomb|Bomb"):
            open_image(png_of_size(width, height))


def test_postscript_is_not_run() -> None:
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DecodeError, match="EPS, which Pillow"):
        decode(script, 16, 3)
