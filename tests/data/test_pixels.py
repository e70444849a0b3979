"""Values are scaled to 0 to 255 by the range that the file declares, or the image is refused with the reason."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from pipeline.data.images import FORMATS, DecodeError, decode, encode_png, fit, open_image, sniff
from tests.data.common import encode, picture
from tests.data.image_files import jpeg2000, png, sgi, tiff

TWELVE = np.array([[0, 1, 1000], [2048, 3000, 4095]])  # twelve bits
AS_BYTES = np.floor(TWELVE * 255 / 4095 + 0.5).astype(int).tolist()
UNIT = np.array([[0, 0.25, 0.5], [0.6, 0.8, 1]])  # 0 to 1
UNIT_AS_BYTES = [[0, 64, 128], [153, 204, 255]]
FULL = np.array([[0, 257, 30000], [32768, 65278, 65535]])  # sixteen bits
FULL_AS_BYTES = (FULL // 257).tolist()
UNSAID = "nothing in the file says"


def grey(data: bytes, width: int = 0) -> list[list[int]]:
    """Return the grey values [H, W] without resizing."""
    image = open_image(data)
    pixels: list[list[int]] = fit(data, min(image.size), 1)[..., 0].tolist()
    return pixels


def colours(data: bytes, channels: int = 3) -> list[list[list[int]]]:
    pixels: list[list[list[int]]] = fit(data, min(open_image(data).size), channels).tolist()
    return pixels


def refused(data: bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(data, 4, 3)
    return str(caught.value)


def smax(low: float, high: float) -> dict[int, tuple[int, list[float]]]:
    """Return TIFF's tags SMinSampleValue and SMaxSampleValue, as doubles."""
    return {340: (12, [low]), 341: (12, [high])}


# Ranges that the file declares.


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True])
def test_floats_are_scaled_by_the_range_that_the_file_gives(order: str, packed: bool) -> None:
    for low, high in ((0, 1), (-1, 1), (0, 255), (10, 20)):
        values = (low + UNIT * (high - low)).astype(np.float32)
        data = tiff(values, 32, smax(low, high), sample=3, packed=packed, order=order)
        assert grey(data) == UNIT_AS_BYTES, (low, high)


def test_the_range_of_floats_may_be_given_in_any_type() -> None:
    values = UNIT.astype(np.float32)
    for tags in ({341: (11, [1.0])}, {341: (3, [1])}, {280: (3, [0]), 281: (3, [1])}):
        assert grey(tiff(values, 32, tags, sample=3)) == UNIT_AS_BYTES


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True])
def test_integers_are_scaled_by_the_range_that_the_file_gives(order: str, packed: bool) -> None:
    small = np.array([[0, 1, 100], [128, 200, 255]])
    for values, kind, bits, sample, low, high in (
        (small, np.int32, 32, 2, 0, 255),
        (small - 128, np.int32, 32, 2, -128, 127),
        (small - 128, np.int16, 16, 2, -128, 127),
        (small - 128, np.int8, 8, 2, -128, 127),
        (small * 3, np.uint16, 16, 1, 0, 765),
        (small + 1000, np.uint16, 16, 1, 1000, 1255),
    ):
        data = tiff(values.astype(kind), bits, smax(low, high), sample=sample, packed=packed, order=order)
        assert grey(data) == small.tolist(), (kind, low, high)


def test_thirty_two_bits_without_a_sign_reach_their_upper_half() -> None:
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    assert grey(tiff(values, 32, smax(0, 2**32 - 1))) == [[0, 128, 255]]


@pytest.mark.parametrize("tag", [281, 341])
@pytest.mark.parametrize("packed", [False, True])
def test_twelve_bits_in_sixteen_of_a_tiff(tag: int, packed: bool) -> None:
    for order in "<>":
        data = tiff(TWELVE.astype(np.uint16), 16, {tag: (3, [4095])}, packed=packed, order=order)
        assert grey(data) == AS_BYTES


def test_twelve_bits_packed_tight_in_a_tiff() -> None:
    row = "".join(f"{value:03x}" for value in TWELVE.ravel())
    for packed in (False, True):
        data = tiff([bytes.fromhex(row)], 12, packed=packed, size=(6, 1))
        assert grey(data) == [AS_BYTES[0] + AS_BYTES[1]]


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 15])
def test_few_bits_in_sixteen_of_a_png(bits: int) -> None:
    top = (1 << bits) - 1
    values = np.array([[0, 1, top // 3], [top // 2, top - 1, top]])
    said = [(b"sBIT", bytes([bits]))]
    expected = np.floor(values * 255 / top + 0.5)
    assert grey(png(values, 16, 0, said)) == expected.tolist()
    # The PNG standard wants values scaled to the full range.
    spread = values << (16 - bits) | values >> (2 * bits - 16)
    assert grey(png(spread, 16, 0, said)) == (spread // 257).tolist()


def test_few_bits_in_colours_of_sixteen() -> None:
    values = np.stack([TWELVE, TWELVE[::-1], TWELVE[:, ::-1]], -1)
    expected = np.floor(values * 255 / 4095 + 0.5).astype(int)
    assert colours(png(values, 16, 2, [(b"sBIT", b"\x0c\x0c\x0c")])) == expected.tolist()
    alpha = np.concatenate([values, TWELVE[..., None]], -1)
    both = np.floor(alpha * 255 / 4095 + 0.5).astype(int)
    assert colours(png(alpha, 16, 6, [(b"sBIT", b"\x0c\x0c\x0c\x0c")]), 4) == both.tolist()
    pairs = both[..., [0, 0, 0, 3]]
    assert colours(png(alpha[..., [0, 3]], 16, 4, [(b"sBIT", b"\x0c\x0c")]), 4) == pairs.tolist()
    for order in "<>":
        for packed in (False, True):
            told = {281: (3, [4095] * 3)}
            data = tiff(values.astype(np.uint16), 16, told, photometric=2, packed=packed, order=order)
            assert colours(data) == expected.tolist()


def test_few_bits_in_eight_of_a_png() -> None:
    assert grey(png([[0, 1, 7, 15]], 8, 0, [(b"sBIT", b"\4")])) == [[0, 17, 119, 255]]
    assert colours(png([[[0, 16, 31]]], 8, 2, [(b"sBIT", b"\5\5\5")])) == [[[0, 132, 255]]]
    assert colours(png([[[3, 1], [1, 3]]], 8, 4, [(b"sBIT", b"\2\2")]), 4) == [
        [[255] * 3 + [85], [85] * 3 + [255]]
    ]
    # These values are already scaled to the full range.
    assert grey(png([[0, 255, 8]], 8, 0, [(b"sBIT", b"\5")])) == [[0, 255, 8]]


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 10, 12, 14])
def test_every_depth_of_jpeg_2000(bits: int) -> None:
    top = (1 << bits) - 1
    values = np.linspace(0, top, 16).round().astype(int).reshape(4, 4)
    assert grey(jpeg2000(values, bits)) == np.floor(values * 255 / top + 0.5).tolist()


def test_the_largest_value_of_the_pnm_formats() -> None:
    words = b"%d " * 6 % tuple(TWELVE.ravel())
    assert grey(b"P2\n3 2\n4095\n" + words) == AS_BYTES
    assert grey(b"P5\n3 2\n4095\n" + TWELVE.astype(">u2").tobytes()) == AS_BYTES
    assert grey(b"P5\n4 1\n15\n\x00\x01\x07\x0f") == [[0, 17, 119, 255]]
    assert colours(b"P6\n1 1\n4095\n" + np.array([0, 2048, 4095], ">u2").tobytes()) == [[[0, 128, 255]]]
    # White is 65535 in this file, however dark the image is.
    assert grey(b"P5\n3 1\n65535\n" + np.array([0, 1000, 4095], ">u2").tobytes()) == [[0, 3, 15]]


# Sixteen-bit values that use the whole range need no declaration.


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True])
def test_sixteen_bits_of_a_tiff(order: str, packed: bool) -> None:
    values = FULL.astype(np.uint16)
    assert grey(tiff(values, 16, packed=packed, order=order)) == FULL_AS_BYTES
    three = np.stack([values, values[::-1], values[:, ::-1]], -1)
    data = tiff(three, 16, photometric=2, packed=packed, order=order)
    assert colours(data) == (three // 257).tolist()


def test_sixteen_bits_of_a_png_in_every_kind_of_colour() -> None:
    three = np.stack([FULL, FULL[::-1], FULL[:, ::-1]], -1)
    four = np.concatenate([three, FULL[..., None]], -1)
    pairs = (four // 257)[..., [0, 0, 0, 3]]
    assert grey(png(FULL, 16, 0)) == FULL_AS_BYTES
    assert colours(png(three, 16, 2)) == (three // 257).tolist()
    assert colours(png(four, 16, 6), 4) == (four // 257).tolist()
    assert colours(png(four[..., [0, 3]], 16, 4), 4) == pairs.tolist()


def test_sixteen_bits_of_other_formats() -> None:
    assert grey(sgi(np.array([[0, 65535, 32768]]))) == [[0, 255, 128]]
    assert grey(jpeg2000(np.array([[0, 65535], [32768, 257]]), 16)) == [[0, 255], [127, 1]]
    assert grey(b"P5\n3 1\n65535\n" + np.array([0, 30000, 65535], ">u2").tobytes()) == [[0, 116, 255]]


def test_a_black_image_of_sixteen_bits_is_black() -> None:
    black = np.zeros((2, 2), np.uint16)
    for data in (png(black, 16, 0), tiff(black, 16), png(black, 16, 0, [(b"sBIT", b"\x0c")]), sgi(black)):
        assert grey(data) == [[0, 0], [0, 0]]


def test_white_is_zero_at_every_depth() -> None:
    values = FULL.astype(np.uint16)
    turned = (255 - FULL // 257).tolist()
    assert grey(tiff(values, 16, photometric=0)) == turned
    assert grey(tiff(values, 16, photometric=0, packed=True)) == turned
    assert grey(tiff(UNIT.astype(np.float32), 32, smax(0, 1), photometric=0, sample=3)) == [
        [255 - v for v in row] for row in UNIT_AS_BYTES
    ]
    assert grey(tiff([b"\x00\x64\xff"], 8, photometric=0, size=(3, 1))) == [[255, 155, 0]]
    assert grey(tiff([b"\x0f"], 4, photometric=0, size=(2, 1))) == [[255, 0]]
    assert grey(tiff([b"\x1b"], 2, photometric=0, size=(4, 1))) == [[255, 170, 85, 0]]
    assert grey(tiff([b"\xa0"], 1, photometric=0, size=(4, 1))) == [[0, 255, 0, 255]]


def test_one_two_and_four_bits() -> None:
    assert grey(png([[0b00011011]], 2, 0, width=4)) == [[0, 85, 170, 255]]
    assert grey(png([[0x01, 0x7F]], 4, 0, width=4)) == [[0, 17, 119, 255]]
    assert grey(png([[0b10100000]], 1, 0, width=4)) == [[255, 0, 255, 0]]
    assert grey(tiff([b"\x1b"], 2, size=(4, 1))) == [[0, 85, 170, 255]]
    assert grey(tiff([b"\x01\x7f"], 4, size=(4, 1))) == [[0, 17, 119, 255]]
    assert grey(b"P1\n4 1\n0 1 0 1\n") == [[255, 0, 255, 0]]


@pytest.mark.parametrize("packed", [False, True])
def test_other_colour_spaces(packed: bool) -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    expected = [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]]
    assert colours(tiff(inks, 8, photometric=5, packed=packed)) == expected
    assert colours(tiff(inks.astype(np.uint16) * 257, 16, photometric=5, packed=packed)) == expected
    lab = np.array([[[255, 0, 0], [0, 0, 0]]], np.uint8)
    assert (
        np.abs(np.array(colours(tiff(lab, 8, photometric=8, packed=packed))) - [[[255] * 3, [0] * 3]]).max()
        <= 2
    )
    ycc = np.array([[[255, 128, 128], [76, 85, 255]]], np.uint8)
    pixels = colours(tiff(ycc, 8, {530: (3, [1, 1])}, photometric=6, packed=packed))
    assert np.abs(np.array(pixels) - [[[255, 255, 255], [255, 0, 0]]]).max() <= 2


def test_colours_in_planes_are_right_or_refused() -> None:
    planes = {284: (3, [2]), 258: (3, [8] * 3), 277: (3, [3]), 339: (3, [1] * 3)}
    for packed in (False, True):
        data = tiff([b"\1\2", b"\3\4", b"\5\6"], 8, planes, photometric=2, packed=packed, size=(2, 1))
        assert colours(data) == [[[1, 3, 5], [2, 4, 6]]]
    deep = planes | {258: (3, [16] * 3)}
    values = [np.array([a, b], "<u2").tobytes() for a, b in ((4660, 32768), (4095, 65535), (257, 0))]
    for packed in (False, True):
        data = tiff(values, 16, deep, photometric=2, packed=packed, size=(2, 1))
        assert "planes" in refused(data)
    pair = {284: (3, [2]), 258: (3, [8] * 2), 277: (3, [2]), 339: (3, [1] * 2), 338: (3, [2])}
    assert "planes" in refused(tiff([b"\1\2", b"\3\4"], 8, pair, packed=True, size=(2, 1)))


# Ranges that nothing declares.


@pytest.mark.parametrize("order", ["<", ">"])
def test_floats_of_no_range_are_refused(order: str) -> None:
    for top in (1, 255, 1e6):
        assert UNSAID in refused(tiff((UNIT * top).astype(np.float32), 32, sample=3, order=order))
    assert UNSAID in refused(b"Pf\n3 2\n-1.0\n" + UNIT.astype("<f4").tobytes())
    assert UNSAID in refused(encode(Image.fromarray(UNIT.astype(np.float32)), "TIFF"))
    # An empty range is none.
    assert UNSAID in refused(tiff(UNIT.astype(np.float32), 32, smax(1, 1), sample=3))


def test_integers_of_no_range_are_refused() -> None:
    values = np.array([[0, 100, 255]])
    for kind, bits, sample in ((np.int32, 32, 2), (np.uint32, 32, 1), (np.int16, 16, 2), (np.int8, 8, 2)):
        for packed in (False, True):
            assert UNSAID in refused(tiff(values.astype(kind), bits, sample=sample, packed=packed))
    assert UNSAID in refused(encode(Image.fromarray(values.astype(np.int32)), "TIFF"))


def test_sixteen_bits_that_may_be_twelve_are_refused() -> None:
    for top in (1, 255, 1023, 4095):
        values = np.array([[0, top], [top // 2, top]], np.uint16)
        three = np.stack([values] * 3, -1)
        four = np.concatenate([three, np.full((2, 2, 1), 65535, np.uint16)], -1)
        for data in (
            png(values, 16, 0),
            png(three, 16, 2),
            png(four, 16, 6),
            png(four[..., [0, 3]], 16, 4),
            tiff(values, 16),
            tiff(values, 16, packed=True, order=">"),
            tiff(three, 16, photometric=2),
            tiff(np.concatenate([three, values[..., None]], -1), 16, photometric=5),
            sgi(values),
            jpeg2000(values, 16),
        ):
            assert UNSAID in refused(data), (top, data[:4])
    assert grey(png([[0, 4096]], 16, 0)) == [[0, 15]]


def test_what_the_file_says_counts_even_where_it_is_dark() -> None:
    dark = np.array([[0, 4095]], np.uint16)
    assert grey(png(dark, 16, 0, [(b"sBIT", b"\x10")])) == [[0, 15]]
    assert grey(tiff(dark, 16, {281: (3, [65535])})) == [[0, 15]]


def test_few_bits_that_may_lie_at_either_end_are_refused() -> None:
    assert "upper or the lower" in refused(png([[0, 2048]], 16, 0, [(b"sBIT", b"\x0c")]))
    # So many values whose low bits are all zero can't be chance.
    ramp = np.arange(0, 4096, 128)[None]
    assert grey(png(ramp, 16, 0, [(b"sBIT", b"\x0c")])) == (ramp // 257).tolist()


def test_values_outside_the_range_that_the_file_gives_are_refused() -> None:
    assert "where the file says" in refused(tiff(UNIT.astype(np.float32), 32, smax(0, 0.5), sample=3))
    assert "where the file says" in refused(tiff(FULL.astype(np.uint16), 16, {281: (3, [4095])}))
    assert "where the file says" in refused(tiff(np.array([[-1, 5]], np.int32), 32, smax(0, 255), sample=2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_refused(bad: float) -> None:
    values = UNIT.astype(np.float32)
    values[0, 0] = bad
    assert "not finite" in refused(tiff(values, 32, smax(0, 1), sample=3))


def test_signed_jpeg_2000_is_refused() -> None:
    data = bytearray(jpeg2000(np.full((4, 4), 5), 8))
    data[42] |= 0x80
    assert UNSAID in refused(bytes(data))


def test_a_colour_map_of_eight_bits_is_refused() -> None:
    small = {320: (3, list(range(256)) * 3)}
    right = {320: (3, [i * 257 for i in range(256)] * 3)}
    assert "colour map" in refused(tiff([b"\x64\xc8"], 8, small, photometric=3, size=(2, 1)))
    assert grey(tiff([b"\x64\xc8"], 8, right, photometric=3, size=(2, 1))) == [[100, 200]]


def test_unknown_kinds_of_values_are_refused() -> None:
    assert refused(tiff(UNIT, 64, sample=3))
    assert refused(tiff(UNIT.astype(np.float16), 16, sample=3))
    half = {530: (3, [2, 2])}
    data = tiff(np.zeros((2, 2, 3), np.uint8), 8, half | {279: (4, [6])}, photometric=6)
    assert "half the size" in refused(data)


# Alpha.


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png([[[9, 8, 7, 100]]], 8, 6), [9, 8, 7, 100]),
        (png([[[9, 100]]], 8, 4), [9, 9, 9, 100]),
        (png([[[9, 8, 7]]], 8, 2), [9, 8, 7, 255]),
        (png([[9]], 8, 0), [9, 9, 9, 255]),
        (png([[1]], 8, 3, [(b"PLTE", bytes([1, 2, 3, 4, 5, 6])), (b"tRNS", b"\xff\x40")]), [4, 5, 6, 64]),
        (png([[1]], 8, 3, [(b"PLTE", bytes([1, 2, 3, 4, 5, 6]))]), [4, 5, 6, 255]),
        (png([[[9, 8, 7]]], 8, 2, [(b"tRNS", bytes([0, 9, 0, 8, 0, 7]))]), [9, 8, 7, 0]),
        (png([[9]], 8, 0, [(b"tRNS", b"\0\x09")]), [9, 9, 9, 0]),
        (png([[0xC0]], 2, 0, [(b"tRNS", b"\0\x03")], width=1), [255, 255, 255, 0]),
        (png([[0x70]], 4, 0, [(b"tRNS", b"\0\x07")], width=1), [119, 119, 119, 0]),
        (png([[0x80]], 1, 0, [(b"tRNS", b"\0\x01")], width=1), [255, 255, 255, 0]),
        (png([[30000]], 16, 0, [(b"tRNS", struct.pack(">H", 30000))]), [116, 116, 116, 0]),
        (png([[30000]], 16, 0, [(b"tRNS", struct.pack(">H", 30001))]), [116, 116, 116, 255]),
        (png([[[30000, 1, 257]]], 16, 2, [(b"tRNS", struct.pack(">3H", 30000, 1, 257))]), [116, 0, 1, 0]),
        (tiff(np.array([[[50, 100]]], np.uint8), 8, {338: (3, [1])}), [127, 127, 127, 100]),
        (tiff(np.array([[[50, 100]]], np.uint8), 8, {338: (3, [2])}), [50, 50, 50, 100]),
        (tiff(np.array([[[9, 8, 7, 100]]], np.uint8), 8, {338: (3, [2])}, photometric=2), [9, 8, 7, 100]),
        (
            tiff(np.array([[[12850, 0, 25700, 25700]]], np.uint16), 16, {338: (3, [1])}, photometric=2),
            [127, 0, 255, 100],
        ),
        (encode(Image.new("RGBA", (1, 1), (9, 8, 7, 100)), "WEBP", lossless=True), [9, 8, 7, 100]),
        (encode(Image.new("P", (1, 1), 0), "GIF", transparency=0), [0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_four_channels_keep_alpha(data: bytes, expected: list[int]) -> None:
    pixels = decode(data, 1, 4)[0, 0]
    assert pixels[3] == expected[3]
    assert pixels[3] == 0 or pixels.tolist() == expected
    over = decode(data, 1, 3, background=(10, 200, 30))[0, 0].astype(int)
    share = expected[3] / 255
    mixed = np.array(expected[:3]) * share + np.array([10, 200, 30]) * (1 - share)
    assert np.abs(over - mixed).max() <= 1


def test_what_is_transparent_does_not_bleed_into_what_is_not() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, :16] = (255, 0, 0, 0)  # transparent red
    pixels[:, 16:] = (0, 0, 255, 255)
    for source in (pixels, encode_png(pixels)):
        small = decode(source, 7, 4).astype(int)
        seen = small[small[..., 3] > 8]
        assert len(seen)
        assert seen[:, 0].max() <= 8
        assert seen[:, 2].min() >= 247
        assert small[:, 0, 3].max() == 0


def test_alpha_survives_the_round_trip() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 4), dtype=np.uint8)
    assert (decode(encode_png(pixels), 9, 4) == pixels).all()
    assert (fit(encode_png(pixels), 9, 4) == pixels).all()


# Arrays.


@pytest.mark.parametrize("own", [1, 3, 4])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_array_is_the_image_that_its_png_is(own: int, channels: int) -> None:
    pixels = np.random.default_rng(own).integers(0, 256, (12, 20, own), dtype=np.uint8)
    data = encode_png(pixels)
    for size in (6, 12, 24):
        options = {"background": (10, 200, 30), "crop": (0.2, 0.9)}
        assert (decode(pixels, size, channels, **options) == decode(data, size, channels, **options)).all()
        assert (fit(pixels, size, channels) == fit(data, size, channels)).all()
    assert open_image(pixels).size == (20, 12)
    turned = pixels.transpose(1, 0, 2)[::-1]
    assert (fit(turned, 12, channels) == fit(encode_png(np.ascontiguousarray(turned)), 12, channels)).all()


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(DecodeError, match=r"uint8 \[H, W, C\]|empty"):
        decode(pixels, 4, 3)


# Formats.

NOT_WRITTEN = {"CUR", "DCX", "FLI", "FTEX", "GBR", "PIXAR", "PSD", "SUN", "XPM", "XVTHUMB"}


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - NOT_WRITTEN))
def test_formats_are_told_by_their_content(kind: str) -> None:
    image = picture(1, 16, 16)
    if kind in ("MSP", "XBM"):
        image = image.convert("1")
    data = encode(image.quantize(16) if kind == "BLP" else image, kind)
    assert sniff(data[:64]) == (None if kind == "TGA" else kind)
    assert decode(data, 16, 3).shape == (16, 16, 3)


def test_formats_that_pillow_does_not_write() -> None:
    sun = struct.pack(">8I", 0x59A66A95, 2, 1, 24, 6, 1, 0, 0) + bytes([3, 2, 1, 6, 5, 4])
    psd = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 1, 2, 8, 3) + bytes(14) + bytes([1, 4, 2, 5, 3, 6])
    xpm = b'/* XPM */\nstatic char *a[] = {\n"2 1 2 1",\n"a c #010203",\n"b c #040506",\n"ab"\n};\n'
    for kind, data in (("SUN", sun), ("PSD", psd), ("XPM", xpm)):
        assert sniff(data[:64]) == kind
        assert colours(data) == [[[1, 2, 3], [4, 5, 6]]]


def test_pillow_can_open_every_format_that_is_listed() -> None:
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)
    assert not {"EPS", "BUFR", "GRIB", "HDF5", "WMF", "MPEG"} & set(FORMATS)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
FOREIGN = [
    ("HEIC", HEIC),
    ("HEIC", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic"),
    ("JPEG XL", b"\xff\x0a\xfa\x7f\x01"),
    ("JPEG XL", b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl "),
    ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n"),
    ("EPS", b"\xc5\xd0\xd3\xc6\x1e\0\0\0"),
    ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg" width="1"/>'),
    ("SVG", b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg width="1"/>'),
    ("WMF", b"\xd7\xcd\xc6\x9a\0\0"),
    ("EMF", b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(8)),
    ("OpenEXR", b"\x76\x2f\x31\x01\2\0\0\0"),
    ("Radiance HDR", b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n"),
    ("PFM", b"PF\n2 2\n-1.0\n" + bytes(48)),
    ("XCF", b"gimp xcf v011\0"),
    ("camera raw", b"II*\0\x10\0\0\0CR\2\0"),
]


@pytest.mark.parametrize(("kind", "data"), FOREIGN)
def test_images_that_cannot_be_read_are_named(kind: str, data: bytes) -> None:
    assert sniff(data) == kind
    assert kind not in FORMATS
    assert refused(data) == f"{kind}, which Pillow can't decode here"


@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "JPEG2000"])
def test_a_codec_that_pillow_was_built_without_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(1, 16, 16), kind)

    def missing(*_: object) -> None:
        raise SyntaxError("support not installed")

    monkeypatch.setitem(Image.OPEN, kind, (missing, None))
    monkeypatch.setattr(features, "check", lambda name: False)
    assert refused(data) == f"{kind}, which this Pillow lacks"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!DOCTYPE html>\n<html><body><svg width='1'></svg></body></html>",
        b'{"image": "a.png", "label": 3}',
        b"P1 was the first prize, P2 the second.",
        b"BM is what the file begins with, and more words follow until 64",
        b"GIF files are old\n",
        b"\nA page that begins with an empty line, like a PCX file's header.",
        b"id,label\n1,cat\n",
        b"#define ANSWER 42\n#define image_width 3\n",
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"PK\x03\x04" + bytes(60),
        b"PAR1" + bytes(60),
        b"\x1f\x8b\x08" + bytes(60),
        b"\0\0\x08\x03" + bytes(60),
        b"\0\0\2\0" + bytes(60),
        b"\x89HDF\r\n\x1a\n" + bytes(56),
        b"\0\0\0\x18ftypmp42\0\0\0\0isommp42",
        b"%PDF-1.7\n",
        b"\x93NUMPY\1\0" + bytes(56),
        bytes(64),
        b"\xff" * 64,
    ],
)
def test_what_is_no_image_is_none(data: bytes) -> None:
    assert sniff(data) is None
    assert refused(data)


def test_a_tar_is_no_image(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(__file__, "P1 2 2.txt")
    data = (tmp_path / "a.tar").read_bytes()
    assert sniff(data[:64]) is None
    assert "UnidentifiedImageError" in refused(data)


def test_random_bytes_are_hardly_ever_an_image() -> None:
    rng = np.random.default_rng(0)
    assert sum(sniff(rng.bytes(64)) is not None for _ in range(20_000)) <= 5


def test_tga_is_told_by_its_end_or_its_length() -> None:
    data = encode(picture(1, 16, 16), "TGA")
    old = data[: 18 + 16 * 16 * 3]  # as the format's first version has it
    assert (decode(old, 16, 3) == decode(data, 16, 3)).all()
    assert refused(old[:-1])
    assert refused(old + b"\0")


# Reasons.


def test_reasons_are_the_same_at_every_run() -> None:
    broken = [
        b"neither fish nor fowl",
        encode(picture(1), "PNG")[:60],
        encode(picture(1), "TIFF")[:60],
        encode(picture(1), "JPEG")[:100],
        tiff(UNIT, 64, sample=3),
        encode(picture(1), "GIF")[:30],
        encode(picture(1), "WEBP")[:40],
        b"\x89PNG\r\n\x1a\n" + bytes(40),
        b"8BPS\0\x01" + bytes(40),
        HEIC,
    ]
    for data in broken:
        said = {refused(data) for _ in range(3)}
        assert len(said) == 1
        assert not re.search(r"0x[0-9a-f]{6}|object at", said.pop())


def test_the_header_of_a_png_comes_first() -> None:
    data = encode(picture(1))
    late = data[:8] + struct.pack(">I", 0) + b"tEXt" + struct.pack(">I", zlib.crc32(b"tEXt")) + data[8:]
    assert "header" in refused(late)
    assert io.BytesIO(late).read(8) == data[:8]
