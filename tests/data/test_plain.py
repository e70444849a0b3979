"""Plain JPEG and PNG files are decoded without Pillow, with the same pixels and the same refusals as Pillow's."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms, ImageFile

from pipeline.data import images
from pipeline.data.images import MAX_PIXELS, DecodeError, decode, open_image
from pipeline.data.plain import plain_pixels
from tests.data.common import encode, picture
from tests.data.image_files import chunk, png

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
Outcome = bytes | str


def taken(data: bytes, at_least: int = 0) -> bool:
    return plain_pixels(data, at_least, MAX_PIXELS) is not None


def outcome(data: bytes, at_least: int = 0) -> Outcome:
    """Return a file's mode, size and pixels, or the reason of its refusal."""
    try:
        image = open_image(data, at_least=at_least, alpha=True)
    except DecodeError as error:
        return str(error)
    return f"{image.mode} {image.size}".encode() + image.tobytes()


def same(data: bytes, at_least: int = 0) -> bool:
    """Check that a file's outcome is Pillow's. Return whether it was decoded without Pillow."""
    took = list[bool]()

    def noted(*arguments: Any) -> np.ndarray | None:
        pixels = plain_pixels(*arguments)
        took.append(pixels is not None)
        return pixels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "plain_pixels", noted)
        found = outcome(data, at_least)
        patch.setattr(images, "plain_pixels", lambda *_: None)
        assert outcome(data, at_least) == found, data
    return any(took)


def noise(rng: np.random.Generator, width: int, height: int, mode: str) -> Image.Image:
    if rng.random() < 0.5:
        return picture(int(rng.integers(1000)), width, height, mode)
    channels = {"L": 1, "LA": 2, "RGBA": 4, "CMYK": 4}.get(mode, 3)
    pixels = rng.bytes(width * height * channels)
    known = mode if channels != 3 else "RGB"
    return Image.frombytes(known, (width, height), pixels).convert(mode)


def sides(rng: np.random.Generator) -> tuple[int, int]:
    largest = 50 if rng.random() < 0.95 else 300
    return int(rng.integers(1, largest)), int(rng.integers(1, largest))


def jpegs(count: int, rng: np.random.Generator) -> Iterator[tuple[bytes, bool]]:
    """Yield JPEG files of all kinds that Pillow writes, and whether each is plain."""
    for _ in range(count):
        mode, options, plain = str(rng.choice(["L", "RGB", "RGB", "RGB", "CMYK"])), dict[str, object](), True
        options["quality"] = int(rng.integers(1, 101))
        options["subsampling"] = int(rng.integers(3)) if mode != "L" else -1
        plain = mode != "CMYK"
        if rng.random() < 0.3:
            options["optimize"] = True
        if rng.random() < 0.3:
            options["restart_marker_blocks"] = int(rng.integers(1, 9))
        if rng.random() < 0.2:
            options["restart_marker_rows"] = int(rng.integers(1, 4))
        if rng.random() < 0.2:
            options |= {"icc_profile": PROFILE, "comment": b"words", "dpi": (72, 300)}
        if mode == "RGB" and rng.random() < 0.1:
            options |= {"keep_rgb": True, "subsampling": 0}
        if rng.random() < 0.1:
            options["progressive"], plain = True, False
        if rng.random() < 0.1:
            tags = Image.Exif()
            tags[0x0112] = int(rng.integers(1, 9))
            options["exif"], plain = tags, False
        yield encode(noise(rng, *sides(rng), mode), "JPEG", **options), plain


def test_jpeg_files_of_all_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 2**22)  # Pillow's header buffer; too small for some
    rng = np.random.default_rng(1)
    for data, plain in jpegs(900, rng):
        assert same(data) == plain
        at_least = int(rng.integers(1, 80))
        assert same(data, at_least) == plain, at_least
        if plain:
            found = plain_pixels(data, 0, MAX_PIXELS)
            assert found is not None
            assert (found.squeeze() == np.asarray(Image.open(io.BytesIO(data))).squeeze()).all()


def test_png_files_of_all_kinds() -> None:
    rng = np.random.default_rng(2)
    for _ in range(800):
        mode = str(rng.choice(["L", "RGB", "RGBA", "LA", "P", "1", "I;16"]))
        image = noise(rng, *sides(rng), "L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        options: dict[str, object] = {"compress_level": int(rng.integers(10))}
        plain = mode in ("L", "RGB", "RGBA")
        if rng.random() < 0.2:
            options["dpi"] = (72, 72)
        if rng.random() < 0.1:
            options["icc_profile"], plain = PROFILE, False
        if rng.random() < 0.2 and mode in ("L", "RGB"):
            options["transparency"], plain = 7 if mode == "L" else (7, 7, 7), False
        assert same(encode(image, "PNG", **options)) == plain


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (6, 4)])
def test_png_files_byte_by_byte(colour: int, channels: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(12):
        width, height = (int(n) for n in rng.integers(1, 30, 2))
        values = np.zeros((height, width, channels))
        rows = [bytes([rng.integers(5)]) + rng.bytes(width * channels) for _ in range(height)]
        whole = b"".join(rows)

        def made(
            pixels: bytes, *chunks: tuple[bytes, bytes], depth: int = 8, values: np.ndarray = values
        ) -> bytes:
            return png(values, depth, colour, chunks, pixels=pixels)

        assert same(made(whole))
        assert same(made(whole + rng.bytes(900)))  # trailing bytes
        assert not same(made(whole[: int(rng.integers(len(whole)))]))
        assert not same(made(b"\7" + whole[1:]))  # an unknown filter
        for kind, content in (
            (b"gAMA", struct.pack(">I", 45455)), (b"cHRM", rng.bytes(32)), (b"sRGB", b"\0"),
            (b"pHYs", rng.bytes(9)), (b"tIME", rng.bytes(7)), (b"tEXt", b"Software\0words"),
        ):  # fmt: skip
            assert same(made(whole, (kind, content))), kind
            assert not same(made(whole, (kind, content[:3]))) or kind == b"sRGB"
            after = made(whole)[:-12] + chunk(kind, content) + made(whole)[-12:]
            assert not same(after)
        for kind, content in (
            (b"tEXt", b"transparency\0words"), (b"tEXt", b"exif\0MM\0*"), (b"sBIT", b"\5" * channels),
            (b"tRNS", bytes(6)), (b"PLTE", bytes(6)), (b"bKGD", bytes(6)), (b"IHDR", b""), (b"prVt", b""),
            (b"eXIf", b"MM\0*\0\0\0\x08\0\0\0\0\0\0"), (b"acTL", struct.pack(">II", 2, 0)),
        ):  # fmt: skip
            assert not same(made(whole, (kind, content))), kind
        packed = zlib.compress(whole)
        for size in (1, 2, 3, 7, len(packed) - 2):
            parts = [packed[at : at + size] for at in range(0, len(packed), size)]
            begins = made(whole).index(b"IDAT") - 4
            data = made(whole)[:begins] + b"".join(chunk(b"IDAT", part) for part in parts)
            assert same(data + chunk(b"IEND", b""))
            assert not same(data)
        interlaced = bytearray(made(whole))
        interlaced[28] = 1
        interlaced[29:33] = zlib.crc32(interlaced[12:29]).to_bytes(4, "big")
        assert not same(bytes(interlaced))


def test_jpeg_files_byte_by_byte() -> None:
    rng = np.random.default_rng(4)
    for number in range(12):
        pixels = rng.integers(0, 256, (*map(int, rng.integers(1, 60, 2)), 3), dtype=np.uint8)
        for sampling in ("444", "422", "420", "Gray", "440", "411"):
            data = simplejpeg.encode_jpeg(pixels, int(rng.integers(1, 100)), "RGB", sampling)
            assert same(data) == (sampling not in ("440", "411"))
        data = encode(
            picture(number, 40, 24), "JPEG", quality=int(rng.integers(20, 100)), subsampling=number % 3
        )
        bare = data[:2] + data[2 + 2 + int.from_bytes(data[4:6], "big") :]
        for whole in (data, bare):
            for transform in range(4):  # Adobe's colour transform
                adobe = b"\xff\xee\0\x0eAdobe\0d\0\0\0\0" + bytes([transform])
                same(whole[:2] + adobe + whole[2:])
        frame = data.index(b"\xff\xc0")
        for factors in (b"\x41\x11\x11", b"\x11\x21\x11", b"\x22\x22\x22", b"\x21\x21\x11", b"\0\x11\x11"):
            odd = bytearray(data)
            odd[frame + 11 : frame + 19 : 3] = factors
            assert not same(bytes(odd))
        scan = data.index(b"\xff\xda")
        for part in (
            b"\0junk", b"\xff", b"\xff\xfe\0\2", b"\xff\xfe\0\1", b"\xff\xdd\0\4\0\1", b"\xff\xd8", b"\xff\xd9",
            b"\xff\xd0", b"\xff\xe5\0\4ab", b"\xff\xed\0\4ab", b"\xff\xe0\0\7JFIF\0", b"\xff\xe2\0\6MPF\0",
        ):  # fmt: skip
            for at in (2, scan, len(data) - 2, len(data)):
                same(data[:at] + part + data[at:])


def test_damaged_files() -> None:
    """Some files are truncated at every length, and each of their bytes is changed."""
    rng, plain = np.random.default_rng(5), 0
    for mode, kind, options in (
        ("RGB", "JPEG", {}), ("L", "JPEG", {"optimize": True}), ("RGB", "JPEG", {"restart_marker_blocks": 1}),
        ("RGB", "PNG", {}), ("L", "PNG", {"dpi": (72, 72)}), ("RGBA", "PNG", {}),
    ):  # fmt: skip
        data = encode(picture(3, 12, 9, mode), kind, **options)
        assert taken(data)
        for stop in range(len(data)):
            assert not same(data[:stop]) or stop > len(data) - 5
            same(data[:stop] + (b"\xff\xd9" if kind == "JPEG" else data[-12:]))
            for value in {data[stop] ^ 1, int(rng.integers(256))} - {data[stop]}:
                plain += same(data[:stop] + bytes([value]) + data[stop + 1 :])
    assert plain > 500  # the pixels changed, but the file is still valid


def test_files_that_are_too_large_are_not_decoded() -> None:
    head = png(np.zeros((1, 1, 3)), 8, 2)
    for width, height in ((8001, 8000), (2**31 - 1, 2**31 - 1), (0, 1)):
        size = b"IHDR" + struct.pack(">II", width, height) + head[24:29]
        data = head[:12] + size + zlib.crc32(size).to_bytes(4, "big") + head[33:]
        assert not same(data)
    large = bytearray(encode(picture(1, 16, 16), "JPEG"))
    place = large.index(b"\xff\xc0")
    large[place + 5 : place + 9] = b"\xff\xff\xff\xff"
    for at_least in (0, 1, 64):
        assert not same(bytes(large), at_least)


def test_what_has_the_size_that_is_wanted_is_given_as_it_is() -> None:
    for kind, mode, channels in (("JPEG", "RGB", 3), ("JPEG", "L", 1), ("PNG", "RGBA", 4), ("PNG", "L", 1)):
        image = Image.open(io.BytesIO(encode(picture(1, 16, 16, mode), kind)))
        found = decode(encode(image, kind), 16, channels)
        reference = np.asarray(Image.open(io.BytesIO(encode(image, kind)))).reshape(16, 16, channels)
        assert found.dtype == np.uint8 and (found == reference).all()
