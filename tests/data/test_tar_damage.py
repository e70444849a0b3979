"""Damaged tars: intact members are used and damaged ones are named, whatever the headers claim."""

import io
import random
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.sources.parts import Item
from tests.data.tar_files import IMAGES, A, B, C, Members, labels, read, special, tar_of

BLOCK = tarfile.BLOCKSIZE
HARD, SOFT = tarfile.LNKTYPE, tarfile.SYMTYPE


def members_of(content: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return tar.getmembers()


def plain(count: int) -> Members:
    return [(f"{i:02d}.png", data) for i, data in enumerate(IMAGES[:count])]


def header(name: str, kind: bytes, size: int) -> bytes:
    """Return a header with a valid checksum that claims any size."""
    block = bytearray(special(name, kind).tobuf(tarfile.GNU_FORMAT))
    size_field = b"%011o\0" % size if size >= 0 else b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
    block[124:136] = size_field if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(*records: str) -> bytes:
    lines = b"".join(f"{len(r) + (4 if len(r) < 96 else 5)} {r}\n".encode() for r in records)
    return header("pax", tarfile.XHDTYPE, len(lines)) + lines.ljust(-(-len(lines) // BLOCK) * BLOCK, b"\0")


def found(items: list[Item]) -> list[bytes]:
    return [item.data for item in items if not item.reason]  # type: ignore[misc]


@pytest.mark.parametrize("number", [0, 1, 5, 9])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "long/" * 40])
def test_a_damaged_header_costs_its_own_image(tmp_path: Path, number: int, format: int, folder: str) -> None:
    content = tar_of([(folder + name, data) for name, data in plain(10)], format=format)
    member = members_of(content)[number]
    at = member.offset_data - BLOCK
    broken = content[:at] + b"\xff" * 100 + content[at + 100 :]
    items = read(tmp_path, broken)
    assert found(items) == IMAGES[:number] + IMAGES[number + 1 : 10]
    assert items[number].path == f"a.tar: damaged at byte {member.offset}"
    assert "no member can be read from byte" in items[number].reason


def test_several_damaged_stretches(tmp_path: Path) -> None:
    content = bytearray(tar_of(plain(10)))
    members = members_of(bytes(content))
    for member in (members[2], members[3], members[7]):
        content[member.offset : member.offset + 8] = b"\xff" * 8
    items = read(tmp_path, bytes(content))
    assert found(items) == [IMAGES[i] for i in (0, 1, 4, 5, 6, 8, 9)]
    assert [i for i, item in enumerate(items) if item.reason] == [2, 6]


@pytest.mark.parametrize("between", [b"\xff" * 512, b"text " * 500, random.Random(0).randbytes(2**20), b"x"])
def test_bytes_between_tars_are_named(tmp_path: Path, between: bytes) -> None:
    one, other = tar_of([("a.png", A)]), tar_of([("b.png", B)])
    items = read(tmp_path, one + between.ljust(-(-len(between) // BLOCK) * BLOCK, b"\0") + other)
    assert [(item.data, bool(item.reason)) for item in items] == [(A, False), (b"", True), (B, False)]
    assert [item.data for item in read(tmp_path, one + between)] == [A, b""]
    assert labels(tmp_path, one + bytes(4096) + other) == [None, None]


def test_a_tar_that_is_cut_short_anywhere(tmp_path: Path) -> None:
    content = tar_of([("long/" * 40 + name, data) for name, data in plain(4)], format=tarfile.PAX_FORMAT)
    members = members_of(content)
    end = members[-1].offset_data + -(-members[-1].size // BLOCK) * BLOCK
    for size in sorted(
        {*range(0, len(content), 256), *(m.offset for m in members), *(m.offset_data for m in members)}
    ):
        items = read(tmp_path, content[:size])
        whole = [data for m, data in zip(members, IMAGES, strict=False) if m.offset_data + m.size <= size]
        assert found(items) == whole, size
        assert len(items) - len(whole) == (0 < size <= end), size
        begun = [m for m in members if m.offset_data <= size < m.offset_data + m.size]
        if begun:
            assert items[-1].path == f"a.tar/{begun[0].name}"
            assert items[-1].reason.startswith(
                f"cut short: the last {begun[0].offset_data + begun[0].size - size} bytes"
            )
        elif len(items) > len(whole):
            assert "damaged at byte" in items[-1].path


def test_a_label_that_is_cut_short(tmp_path: Path) -> None:
    content = tar_of([("a.png", A), ("a.cls", b"1"), ("b.png", B), ("b.cls", b"12345")])
    items = read(tmp_path, content[: content.index(b"12345") + 2])
    assert [(item.path, item.label, item.data) for item in items] == [
        ("a.tar/a.png", "1", A), ("a.tar/b.png", None, b""), ("a.tar/b.cls", None, b""),
    ]  # fmt: skip
    assert "its label can't be read: b.cls: cut short: the last 3 bytes" in items[1].reason


@pytest.mark.parametrize(
    "odd",
    [
        header("big.png", tarfile.REGTYPE, 2**40),
        header("huge.png", tarfile.REGTYPE, 2**70),
        header("negative.png", tarfile.REGTYPE, -1),
        header("negative.png", tarfile.REGTYPE, -(2**40)),
        header("name", tarfile.GNUTYPE_LONGNAME, 2**40),
        header("name", tarfile.GNUTYPE_LONGNAME, -(2**20)),
        header("pax", tarfile.XHDTYPE, 2**33),
        header("pax", tarfile.XGLTYPE, -5),
        header("name", tarfile.GNUTYPE_LONGNAME, 0) * 150 + b"9" * 512,
        header("link", tarfile.GNUTYPE_LONGLINK, 600) * 9,
        header("sparse.png", tarfile.GNUTYPE_SPARSE, 100) + b"9" * 512,
        pax("size=-1024") + header("a.png", tarfile.REGTYPE, 0),
        pax("size=99999999999999") + header("a.png", tarfile.REGTYPE, 0),
        pax("size=many") + header("a.png", tarfile.REGTYPE, 0),
        pax("GNU.sparse.size=99999999999999", "GNU.sparse.offset=0") + header("a.png", tarfile.REGTYPE, 0),
        pax("GNU.sparse.map=0,9,x", "GNU.sparse.size=9") + header("a.png", tarfile.REGTYPE, 0),
        pax("GNU.sparse.map=-5,9", "GNU.sparse.size=9") + header("a.png", tarfile.REGTYPE, 0),
        pax("GNU.sparse.map=0,9000", "GNU.sparse.size=9") + header("a.png", tarfile.REGTYPE, 0),
        pax("GNU.sparse.major=1", "GNU.sparse.minor=0") + header("a.png", tarfile.REGTYPE, 512) + b"9" * 512,
        pax("path=a\0b.png") + header("a.png", tarfile.REGTYPE, 0),
        pax("0 path=x") + header("a.png", tarfile.REGTYPE, 0),
        b"0" * 512,
        bytes(300) + b"1" + bytes(211),
    ],
)  # fmt: skip
def test_headers_that_claim_anything(tmp_path: Path, odd: bytes) -> None:
    before, behind = (
        tar_of([("0.png", A), ("0.cls", b"1")])[:-8192],
        tar_of([("1.png", B), ("1.cls", b"2"), ("2.png", C)]),
    )
    before = before.rstrip(b"\0").ljust(-(-len(before.rstrip(b"\0")) // BLOCK) * BLOCK, b"\0")
    tracemalloc.start()
    items = read(tmp_path, before + odd + behind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    used = [item for item in items if item.data in (A, B, C)]
    assert [(item.data, item.label) for item in used] == [(A, "1"), (B, "2"), (C, None)]
    assert len(items) <= 5
    assert peak < 32 * 2**20


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_one_damaged_block_costs_one_image(
    tmp_path_factory: pytest.TempPathFactory, chance: random.Random
) -> None:
    members = [(f"{i:02d}.png", data) for i, data in enumerate(IMAGES[:12])]
    members += [(f"{i:02d}.cls", str(i).encode()) for i in range(12)]
    chance.shuffle(members)
    content = tar_of(members, format=chance.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    at = BLOCK * chance.randrange(len(content) // BLOCK)
    blocks = [bytes(BLOCK), b"\xff" * BLOCK, chance.randbytes(BLOCK)]
    blocks += (
        [content[:BLOCK]] if members[0][1] in IMAGES else []
    )  # a label's block could give an image a second, contradicting label
    junk = chance.choice(blocks)
    items = read(tmp_path_factory.mktemp("tar"), content[:at] + junk + content[at + BLOCK :])
    by_data = {item.data: item for item in items}
    spared = {m.name for m in members_of(content) if not m.offset <= at < m.offset_data + m.size}
    for i, data in enumerate(IMAGES[:12]):
        if f"{i:02d}.png" in spared:
            assert by_data[data].label == (str(i) if f"{i:02d}.cls" in spared else by_data[data].label)
    assert len(items) <= 14


@pytest.mark.parametrize("seed", range(3))
def test_bytes_that_changed_anywhere(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    content = tar_of([("long/" * 30 * (i % 2) + name, data) for i, (name, data) in enumerate(plain(12))])
    members, lost = members_of(content), 0
    for _ in range(100):
        broken, places = bytearray(content), rng.integers(len(content), size=rng.integers(1, 6))
        for at in places:
            broken[at : at + 9] = rng.bytes(9)[: len(content) - at]
        kept = found(read(tmp_path, bytes(broken)))
        for member, data in zip(members, IMAGES, strict=False):
            spared = not any(member.offset - 9 < at < member.offset_data + member.size for at in places)
            assert data in kept or not spared, (member.name, places)
            lost += data not in kept
    assert lost > 50


def test_links_in_a_damaged_tar(tmp_path: Path) -> None:
    members: Members = [
        ("a.png", A),
        ("b.png", B),
        special("c.png", HARD, "a.png"),
        special("d.png", SOFT, "b.png"),
    ]
    content = bytearray(tar_of(members))
    content[:8] = b"\xff" * 8
    items = read(tmp_path, bytes(content))
    assert found(items) == [B, B]
    assert items[2].reason == "a link to a.png, which is not in the tar"
    cut = read(tmp_path, tar_of([special("c.png", SOFT, "a.png"), ("a.png", A)])[: 2 * BLOCK + 40])
    assert [item.path for item in cut] == ["a.tar/c.png", "a.tar/a.png"]
    assert all(item.reason.startswith(f"cut short: the last {len(A) - 40} bytes") for item in cut)
