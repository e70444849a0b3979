"""An image with intact pixels is used whatever else in its file is broken. A partial image is refused."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from pipeline.data.images import DecodeError, decode, fit
from tests.data.common import encode, picture
from tests.data.image_files import change_jpeg, chunk, png, tiff

MARK = b"\x89PNG\r\n\x1a\n"
ROW = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(5, 6, 3)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CHUNKS = {
    b"tEXt": b"Title\0words",
    b"zTXt": b"Title\0\0" + zlib.compress(b"words"),
    b"iTXt": b"Title\0\0\0\0\0words",
    b"pHYs": struct.pack(">IIB", 2835, 2835, 1),
    b"iCCP": b"name\0\0" + zlib.compress(PROFILE),
    b"gAMA": struct.pack(">I", 45455),
    b"cHRM": struct.pack(">8I", *range(1, 9)),
    b"sRGB": b"\0",
    b"tIME": b"\x07\xe8\1\1\0\0\0",
    b"bKGD": bytes(6),
    b"hIST": bytes(6),
    b"sPLT": b"name\0\x08" + bytes(6),
    b"eXIf": b"MM\0*\0\0\0\x08\0\0\0\0\0\0",
    b"sBIT": b"\x08\x08\x08",
    b"acTL": struct.pack(">II", 2, 0),
    b"prVt": b"private",
}


def exif(orientation: int = 6) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010F] = "a maker"
    return tags.tobytes()


def pixels(data: bytes, side: int = 5) -> np.ndarray:
    return fit(data, side, 3)


def refused(data: bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(data, 4, 3)
    return str(caught.value)


def spoil_checksum(part: bytes) -> bytes:
    return part[:-1] + bytes([part[-1] ^ 1])


def spoil_content(part: bytes) -> bytes:
    return part[:8] + bytes([part[8] ^ 0xFF]) + part[9:]


def longer(part: bytes) -> bytes:
    return struct.pack(">I", int.from_bytes(part[:4], "big") + 7) + part[4:]


def much_longer(part: bytes) -> bytes:
    return b"\x7f\xff\xff\xff" + part[4:]


def shorter(part: bytes) -> bytes:
    return b"\0\0\0\0" + part[4:]


def no_name(part: bytes) -> bytes:
    return part[:4] + b"\1\2\3\4" + part[8:]


def empty(part: bytes) -> bytes:
    return chunk(part[4:8], b"")


def junk(part: bytes) -> bytes:
    return chunk(part[4:8], b"\xff\0\xfe" * 9)


def cut(part: bytes) -> bytes:
    return part[: len(part) // 2]


SPOILERS = [spoil_checksum, spoil_content, longer, much_longer, shorter, no_name, empty, junk, cut]


@pytest.mark.parametrize("kind", CHUNKS)
@pytest.mark.parametrize("spoil", SPOILERS)
def test_broken_chunks_do_not_cost_a_png(kind: bytes, spoil: Callable[[bytes], bytes]) -> None:
    whole = png(ROW, 8, 2)
    header, rest = whole[:33], whole[33:]
    broken = spoil(chunk(kind, CHUNKS[kind]))
    after = rest.index(b"IEND") - 4
    for data in (header + broken + rest, header + rest[:after] + broken + rest[after:]):
        assert (pixels(data) == ROW).all()
    # The broken chunk is the last one, and there is no end marker.
    assert (pixels(header + rest[:after] + broken) == ROW).all()


def test_a_repaired_png_keeps_its_palette_transparency_and_orientation() -> None:
    broken = spoil_checksum(chunk(b"tEXt", b"Title\0words"))
    palette = [(b"PLTE", bytes([1, 2, 3, 4, 5, 6])), (b"tRNS", b"\xff\x40")]
    whole = png([[0, 1]], 8, 3, palette)
    assert fit(whole[:33] + broken + whole[33:], 1, 4).tolist() == [[[1, 2, 3, 255], [4, 5, 6, 64]]]
    few = png([[0, 4095]], 16, 0, [(b"sBIT", b"\x0c")])
    assert fit(few[:33] + broken + few[33:], 1, 1).ravel().tolist() == [0, 255]
    turned = encode(Image.fromarray(ROW), exif=exif())
    expected = np.rot90(ROW, -1)
    assert (pixels(turned) == expected).all()
    assert (pixels(turned[:33] + broken + turned[33:]) == expected).all()


def test_text_that_unfolds_without_end_does_not_cost_a_png() -> None:
    whole = png(ROW, 8, 2)
    bomb = chunk(b"zTXt", b"Title\0\0" + zlib.compress(bytes(80_000_000)))
    assert (pixels(whole[:33] + bomb + whole[33:]) == ROW).all()


def test_damage_to_the_pixels_of_a_png_is_refused() -> None:
    whole = png(ROW, 8, 2)
    text = spoil_checksum(chunk(b"tEXt", b"Title\0words"))
    place = whole.index(b"IDAT") - 4
    size = int.from_bytes(whole[place : place + 4], "big") + 12
    data = whole[place : place + size]
    for spoil in (spoil_checksum, no_name, empty, cut, lambda part: part[:4] + b"iDAT" + part[8:]):
        assert refused(whole[:33] + text + spoil(data) + whole[place + size :])
    for kind in (b"IHDR", b"IDAT"):
        at = whole.index(kind)
        assert refused(whole[:at] + b"XXXX" + whole[at + 4 :])
    palette = png([[0, 1]], 8, 3, [(b"PLTE", bytes([1, 2, 3, 4, 5, 6])), (b"tRNS", b"\xff\x40")])
    for kind in (b"PLTE", b"tRNS"):
        at = palette.index(kind) + 4
        assert refused(palette[:at] + b"\x99" + palette[at + 1 :])


def test_a_png_that_lost_one_of_its_parts_is_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in noise))
    head = MARK + chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0))
    parts = [chunk(b"IDAT", packed[i : i + 500]) for i in range(0, len(packed), 500)]
    end = chunk(b"IEND", b"")
    assert (pixels(head + b"".join(parts), 32) == noise).all()
    for lost in range(len(parts)):
        left = b"".join(parts[:lost] + parts[lost + 1 :])
        for data in (left + end, left, b"".join(parts[:lost]) + end):
            assert refused(head + data)
        bad = spoil_checksum(chunk(b"tEXt", b"Title\0words"))
        assert refused(head + bad + left + end)
        assert refused(head + b"".join([*parts[:lost], no_name(parts[lost]), *parts[lost + 1 :], end]))


@pytest.mark.parametrize("rows", [0, 1, 2, 4])
def test_a_png_that_says_it_is_complete_and_is_not(rows: int) -> None:
    for colour, depth, values in (
        (2, 8, ROW),
        (0, 8, ROW[..., 0]),
        (0, 16, ROW[..., 0].astype(int) * 256 + 5000),
        (6, 8, np.concatenate([ROW, ROW[..., :1]], -1)),
    ):
        kind = ">u2" if depth == 16 else "u1"
        lines = [b"\0" + line.astype(kind).tobytes() for line in values]
        whole = png(values, depth, colour)
        assert decode(whole, 5, 3).shape == (5, 5, 3)
        assert refused(png(values, depth, colour, pixels=b"".join(lines[:rows])))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "JPEG2000"])
def test_a_missing_end_marker_does_not_cost_an_image(kind: str) -> None:
    end = {"PNG": 12, "JPEG": 2, "GIF": 1, "JPEG2000": 2}[kind]
    for seed in range(3):
        for mode in ("RGB", "L"):
            data = encode(picture(seed, 40, 24, mode), kind)
            for left in range(1, end + 1):
                assert (pixels(data[:-left], 24) == pixels(data, 24)).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimize": True},
        {"progressive": True},
        {"quality": 100, "subsampling": 0},
        {"restart_marker_blocks": 1},
    ],
)
def test_a_jpeg_is_used_whole_or_not_at_all(options: dict[str, object]) -> None:
    half = Image.new("RGB", (40, 24), (200, 10, 30))
    half.paste((0, 0, 0), (0, 12, 40, 24))
    for image in (picture(3, 40, 24), half, Image.new("L", (40, 24), 128)):
        data = encode(image, "JPEG", **options)
        expected = pixels(data, 24)
        assert (pixels(data[:-2], 24) == expected).all()
        start = data.index(b"\xff\xda")
        for stop in (*range(start, len(data) - 20, 3), *range(len(data) - 20, len(data) - 2)):
            try:
                found = pixels(data[:stop], 24)
            except DecodeError:
                continue
            assert (found == expected).all(), stop
        assert refused(data[: start + (len(data) - start) * 2 // 5])


def test_a_progressive_jpeg_without_its_last_scans_is_refused() -> None:
    data = encode(picture(3, 40, 24), "JPEG", progressive=True)
    scans = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
    assert len(scans) > 4
    for scan in scans[1:]:
        assert refused(data[:scan])


def test_a_jpeg_that_says_it_is_complete_and_is_not() -> None:
    for mode in ("RGB", "L"):
        data = encode(picture(3, 64, 64, mode), "JPEG", quality=95)
        start = data.index(b"\xff\xda") + 14
        for share in (0.1, 0.5, 0.8):
            stop = start + int((len(data) - start) * share)
            assert "ends before" in refused(data[:stop].rstrip(b"\xff") + b"\xff\xd9")
    grey = Image.new("RGB", (40, 40), (128, 128, 128))
    grey.paste((255, 0, 0), (0, 0, 16, 16))
    assert (decode(encode(grey, "JPEG"), 40, 3)[-1, -1] == 128).all()


def test_a_jpeg_2000_that_says_it_is_complete_and_is_not() -> None:
    """Pillow fills the tiles that are missing."""
    data = encode(picture(3, 32, 32), "JPEG2000", tile_size=(8, 8), no_jp2=True)
    tiles = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\x90"]
    assert len(tiles) == 16
    for tile in tiles[1:]:
        assert "ends before its last tile" in refused(data[:tile] + b"\xff\xd9")


@pytest.mark.slow
def test_every_cut_of_every_format() -> None:
    image = picture(3, 12, 8)
    for kind, options in (
        ("PNG", {}), ("GIF", {}), ("WEBP", {"lossless": True}), ("WEBP", {}), ("BMP", {}), ("DIB", {}),
        ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("TGA", {}), ("ICO", {}),
        ("JPEG2000", {}), ("JPEG2000", {"tile_size": (8, 8), "no_jp2": True}), ("AVIF", {}), ("PCX", {}),
        ("SGI", {}), ("DDS", {}), ("QOI", {}),
    ):  # fmt: skip
        data = encode(image, kind, **options)
        expected = pixels(data, 8)
        used = 0
        for stop in range(len(data) - 1):
            try:
                found = pixels(data[:stop], 8)
            except DecodeError:
                continue
            used += 1
            assert found.shape == expected.shape, (kind, stop)
            assert (found == expected).all(), (kind, stop)
        assert used <= 40, kind  # only the end markers are missing


def test_tags_before_the_pixels_of_a_truncated_tiff() -> None:
    strips = [bytes(range(i, i + 40)) for i in range(4)]
    tags = {278: (3, [1])}
    for packed in (False, True):
        whole = tiff(strips, 8, tags, packed=packed, size=(40, 4))
        assert pixels(whole, 4)[:, :, 0].tolist() == [list(strip) for strip in strips]
        for stop in range(len(whole) - 1, len(whole) - 60, -7):
            assert refused(whole[:stop])


ORIENTED = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
}
BROKEN_EXIF = {
    "nothing": b"Exif\0\0",
    "no TIFF": b"Exif\0\0" + b"\xaa" * 40,
    "a place beyond": b"Exif\0\0MM\0*\x7f\xff\xff\xff\0\1",
    "too many tags": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\3\0\0\0\1\0",
    "no such orientation": b"Exif\0\0MM\0*\0\0\0\x08\0\1"
    + struct.pack(">HHIHH", 0x112, 3, 1, 77, 0)
    + bytes(4),
    "an orientation in words": b"Exif\0\0MM\0*\0\0\0\x08\0\1"
    + struct.pack(">HHI4s", 0x112, 2, 4, b"six")
    + bytes(4),
    "an orientation of no type": b"Exif\0\0MM\0*\0\0\0\x08\0\1"
    + struct.pack(">HHIHH", 0x112, 99, 1, 6, 0)
    + bytes(4),
    "cut": exif()[:15],
}


@pytest.mark.parametrize("kind", ORIENTED)
@pytest.mark.parametrize("broken", BROKEN_EXIF)
def test_an_image_with_broken_exif_is_used_unrotated(kind: str, broken: str) -> None:
    image = picture(3, 16, 12)
    expected = pixels(encode(image, kind, **ORIENTED[kind]), 12)
    if kind == "TIFF":
        data = tiff(np.asarray(image), 8, {34665: (7, BROKEN_EXIF[broken])}, photometric=2)
    else:
        data = encode(image, kind, exif=BROKEN_EXIF[broken], **ORIENTED[kind])
    assert (pixels(data, 12) == expected).all()


def test_orientation_still_counts_where_only_other_tags_are_odd() -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    tags[0x010F] = "a maker"
    data = tags.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x0f\x00\x0c")  # text declared as numbers
    image = picture(3, 16, 12)
    for kind in ("JPEG", "PNG", "WEBP"):
        turned = pixels(encode(image, kind, exif=data, **ORIENTED[kind]), 12)
        assert turned.shape == (16, 12, 3)


def jpeg_with_metadata() -> bytes:
    return encode(picture(3, 16, 12), "JPEG", quality=95, exif=exif(1), icc_profile=PROFILE, comment=b"words")


@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xFE])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 9, 40_000, 65_535])
def test_a_segment_of_a_wrong_length_does_not_cost_a_jpeg(marker: int, size: int) -> None:
    data = jpeg_with_metadata()
    broken = change_jpeg(data, marker, lambda part: struct.pack(">H", size) + part[2:])
    assert (pixels(broken, 12) == pixels(data, 12)).all()


@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xED, 0xEF, 0xFE])
def test_junk_in_a_segment_does_not_cost_a_jpeg(marker: int) -> None:
    data = jpeg_with_metadata()
    expected = pixels(data, 12)
    for start in (
        b"",
        b"JFIF\0",
        b"Exif\0\0",
        b"ICC_PROFILE\0",
        b"MPF\0",
        b"Photoshop 3.0\0008BIM",
        b"http://ns.adobe",
    ):
        content = start + b"\xfe\1\2" * (len(start) % 4)
        segment = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
        assert (pixels(data[:2] + segment + data[2:], 12) == expected).all(), start
    assert (pixels(data[:20] + b"\0junk\1" + data[20:], 12) == expected).all()


def test_the_preview_in_broken_exif_is_not_taken_for_the_image() -> None:
    small = encode(Image.new("RGB", (8, 8), (255, 0, 0)), "JPEG")
    whole = encode(picture(3, 16, 12), "JPEG")
    for size in (2, 9, 200, 60_000):
        segment = b"\xff\xe1" + struct.pack(">H", size) + exif(1) + small
        assert (pixels(whole[:2] + segment + whole[2:], 12) == pixels(whole, 12)).all()
    # A preview without an end marker hides where the image begins.
    segment = b"\xff\xe1" + struct.pack(">H", 9) + exif(1) + small[:-2]
    assert refused(whole[:2] + segment + whole[2:])


def test_a_broken_table_of_a_jpeg_is_refused() -> None:
    data = encode(picture(3, 16, 12), "JPEG")
    for marker in (0xDB, 0xC0, 0xC4):
        assert refused(change_jpeg(data, marker, lambda part: b"\0\1" + part[2:]))


def webp_chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """Return (name, start, end) of each chunk, in bytes."""
    found, place = [], 12
    while place < len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        found.append((data[place : place + 4], place, place + 8 + size + size % 2))
        place = found[-1][2]
    return found


@pytest.mark.parametrize("lossless", [False, True])
def test_broken_chunks_do_not_cost_a_webp(lossless: bool) -> None:
    image = picture(3, 16, 12).convert("RGBA")
    image.putalpha(200)
    data = encode(image, "WEBP", lossless=lossless, exif=exif(1), icc_profile=PROFILE, xmp=b"<x/>")
    expected = fit(data, 12, 4)
    seen = set()
    for kind, start, end in webp_chunks(data):
        if kind not in (b"EXIF", b"XMP ", b"ICCP"):
            continue
        seen.add(kind)
        for size in (0, 1, 5, 2**31):
            broken = data[: start + 4] + struct.pack("<I", size) + data[start + 8 :]
            assert (fit(broken, 12, 4) == expected).all(), (kind, size)
        if kind != b"ICCP":  # the other chunks follow the pixels
            for stop in (start, start + 3, start + 8, end - 1):
                assert (fit(data[:stop], 12, 4) == expected).all(), (kind, stop)
    assert seen == {b"EXIF", b"XMP ", b"ICCP"}
    assert (fit(data[:4] + b"\0\0\0\0" + data[8:], 12, 4) == expected).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_whose_last_frame_is_cut_still_has_its_first(kind: str) -> None:
    frames = [picture(i, 16, 12) for i in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (pixels(data[:-30], 12) == pixels(data, 12)).all()
    assert refused(data[:100])


def test_a_repaired_webp_is_turned_as_its_exif_says() -> None:
    data = encode(picture(3, 16, 12), "WEBP", lossless=True, exif=exif(6), xmp=b"<x/>")
    expected = pixels(data, 12)
    assert expected.shape == (16, 12, 3)
    assert (pixels(data[:-3], 12) == expected).all()


@pytest.mark.parametrize("order", ["<", ">"])
def test_broken_tags_do_not_cost_a_tiff(order: str) -> None:
    values = np.asarray(picture(3, 16, 12))
    for tags in (
        {270: (2, b"words that lie elsewhere\0")},
        {700: (11, [1.0, 2.0])},
        {282: (2, b"abc\0"), 283: (2, b"abc\0"), 296: (3, [3])},
        {34665: (4, [10**9])},
        {34853: (4, [10**9])},
        {330: (4, [10**9])},
        {34675: (7, b"no profile")},
        {274: (2, b"six\0")},
    ):
        data = tiff(values, 8, tags, photometric=2, order=order)
        assert (pixels(data, 12) == values).all(), tags
    far = bytearray(tiff(values, 8, {270: (2, b"words that lie elsewhere\0")}, photometric=2, order=order))
    entry = 10 + 12 * 5
    assert struct.unpack_from(order + "H", far, entry)[0] == 270
    for count, place in ((25, 10**9), (10**9, 10**9), (10**9, 200)):
        struct.pack_into(order + "II", far, entry + 4, count, place)
        assert (pixels(bytes(far), 12) == values).all(), (count, place)


def test_a_repaired_tiff_is_turned_and_scaled() -> None:
    values = np.arange(12, dtype=np.uint16).reshape(3, 4) * 372
    tags = {274: (3, [6]), 281: (3, [4095]), 700: (11, [1.0, 2.0])}
    found = fit(tiff(values, 16, tags), 3, 1)[..., 0]
    expected = np.floor(np.rot90(values, -1).astype(int) * 255 / 4095 + 0.5)
    assert (found == expected).all()


def test_nothing_is_set_for_other_users_of_pillow() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    whole = encode(picture(3, 16, 12), "JPEG")
    pixels(whole[:-2], 12)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    with pytest.raises(OSError, match="runcated"):
        Image.open(io.BytesIO(whole[: len(whole) * 9 // 10])).load()
