"""Zip archives with members that aren't images or can't be read, with damage, and with odd names."""

import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.sources import zip_members
from pipeline.errors import InputError
from pipeline.redact import printable
from tests.data.reading import PNG, labels, opened, put
from tests.data.test_archives import IMAGES, classes_of, pack

# Members that aren't images or can't be read.


def test_other_members_are_named(tmp_path: Path) -> None:
    inner = pack(tmp_path / "inner.zip", classes_of()).read_bytes()
    (tmp_path / "inner.zip").unlink()
    members = {
        "cat/": b"", "cat/1.png": PNG, "cat/2": PNG, "cat/words.txt": b"words", "cat/empty": b"", "more.zip": inner,
        "__MACOSX/cat/._1.png": b"\0\5\x16\7", "cat/.DS_Store": b"x", ".git/a.png": PNG, "Thumbs.db": b"x",
    }  # fmt: skip
    pack(tmp_path / "a.zip", members)
    found, items = opened(tmp_path)
    assert {i.path: i.label for i in items} == {"a.zip/cat/1.png": "cat", "a.zip/cat/2": "cat"}
    hidden = ["__MACOSX/cat/._1.png", "cat/.DS_Store", ".git/a.png", "Thumbs.db"]
    assert found.listing.ignored == {
        **{f"a.zip/{name}": "hidden" for name in hidden},
        **{f"a.zip/{name}": "not an image" for name in ("cat/words.txt", "cat/empty", "more.zip")},
    }


def test_members_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(IMAGES[9])
    names = ["../../up.png", "/etc/abs.png", "cat/../../../x.png", "//host/y.png", "./cat/z.png"]
    path = pack(tmp_path / "data" / "a.zip", dict.fromkeys(names, PNG))
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("cat/link.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, str(secret))
    items = opened(tmp_path / "data")[1]
    assert len(items) == 6 and all(item.data in (PNG, b"") for item in items)
    assert not any(".." in item.path or "//" in item.path for item in items)
    assert {item.path: item.reason for item in items if item.reason} == {"a.zip/cat/link.png": "a link"}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.zip", "data", "secret.png"]


@pytest.mark.parametrize(
    "raw, name",
    [
        (b"caf\xe9", "cafΘ"),  # cp437, a zip file's default encoding of names
        (b"\x81\xff", "ü\xa0"),
        ("ÄÖ".encode(), "ÄÖ"),
        *((name.encode(), name) for name in ("q\"'q", "[a]*?", "a#b%41", " new\nline ", "~xyz")),
    ],
)
def test_odd_names_are_names_like_others(raw: bytes, name: str, tmp_path: Path) -> None:
    stand_in = b"Q" * len(raw)
    pack(tmp_path / "a.zip", {f"{stand_in.decode()}/{stand_in.decode()}.png": PNG, "other/1.png": PNG})
    content = (tmp_path / "a.zip").read_bytes()
    assert content.count(stand_in) == 4
    (tmp_path / "a.zip").write_bytes(content.replace(stand_in, raw))
    shown = printable(name)
    assert labels(tmp_path) == {f"a.zip/{shown}/{shown}.png": shown, "a.zip/other/1.png": "other"}
    (tmp_path / "a.zip").rename(tmp_path / f"{name}.zip")
    assert set(labels(tmp_path).values()) == {shown, "other"}


def test_windows_writes_folders_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("cat\\1.png", "dog\\2.png"):
            info = zipfile.ZipInfo("x")
            info.filename, info.create_system = name, 0
            archive.writestr(info, PNG)
    assert labels(path) == {"a.zip/cat/1.png": "cat", "a.zip/dog/2.png": "dog"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_may_be_there_more_than_once(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for data in IMAGES[:3]:
            archive.writestr("cat/1.png", data)
    found = {item.path: item.data for item in opened(tmp_path)[1]}
    assert found == dict(
        zip(["a.zip/cat/1.png (3)", "a.zip/cat/1.png (2)", "a.zip/cat/1.png"], IMAGES, strict=False)
    )


def patched(path: Path, name: str, change: Callable[[bytearray, int, bool], None]) -> None:
    """Change both headers of a member: the local one and the one in the central directory."""
    data = bytearray(path.read_bytes())
    for signature, length in ((b"PK\3\4", 30), (b"PK\1\2", 46)):
        at = data.find(signature)
        while data[at + length : at + length + len(name)] != name.encode():
            at = data.index(signature, at + 1)
        change(data, at, signature == b"PK\1\2")
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["cat/1.png", "cat/unknown", "cat/3.jpg"])
@pytest.mark.parametrize(
    "fault", ["encrypted", "method 98", "method 9", "checksum", "content", "header", "size"]
)
def test_members_that_cannot_be_read_say_why(name: str, fault: str, tmp_path: Path) -> None:
    members = {"cat/0.png": PNG, name: IMAGES[5], "dog/2.png": PNG}
    path = pack(tmp_path / "a.zip", members)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)

    def change(data: bytearray, at: int, directory: bool) -> None:
        flags, method, crc, size = (8, 10, 16, 24) if directory else (6, 8, 14, 22)
        if fault == "encrypted":
            data[at + flags] |= 1
        elif fault.startswith("method"):
            struct.pack_into("<H", data, at + method, int(fault.split()[1]))
        elif fault == "checksum":
            struct.pack_into("<I", data, at + crc, 12345)
        elif fault == "size":
            struct.pack_into("<I", data, at + size, info.file_size + 7)
        elif fault == "content" and not directory:
            data[at + 30 + len(name) : at + 60 + len(name)] = b"\xff" * 30
        elif fault == "header" and not directory:
            data[at] = 0

    patched(path, name, change)
    words = {
        "encrypted": "encrypted",
        "method 98": "compression method 98",
        "method 9": "compression method 9",
        "header": "no member at",
    }
    _, items = opened(path)
    found = {item.path: item for item in items}
    assert {p for p, item in found.items() if not item.reason} == {"a.zip/cat/0.png", "a.zip/dog/2.png"}
    bad = found[f"a.zip/{name}"]
    assert words.get(fault, "damaged") in bad.reason and bad.data == b"" and bad.label == "cat"
    assert str(tmp_path) not in bad.reason


@pytest.mark.skipif(not shutil.which("zip"), reason="no zip here")
def test_passwords(tmp_path: Path) -> None:
    put(tmp_path / "in", "1.png", "2.png")
    subprocess.run(
        ["zip", "-q", "-r", "-P", "word", tmp_path / "a.zip", "."], cwd=tmp_path / "in", check=True
    )
    assert [item.reason for item in opened(tmp_path / "a.zip")[1]] == [
        "encrypted: unpack the archive first"
    ] * 2


def test_a_few_bytes_that_unpack_to_far_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_members, "MOST_BYTES", 10**6)
    pack(tmp_path / "a.zip", {"1.png": PNG, "2.png": bytes(10**6 + 1)})
    assert {i.path: i.reason for i in opened(tmp_path)[1]} == {
        "a.zip/1.png": "",
        "a.zip/2.png": "1000001 bytes, too large for an image",
    }


# Archives that can't be read, and archives beside images.


@pytest.mark.parametrize("keep", [0, 10, 300, 0.5, 0.9, -30, -1])
def test_archives_that_are_cut_short_are_bad(keep: float, tmp_path: Path) -> None:
    pack(tmp_path / "good.zip", {"cat/1.png": PNG})
    whole = pack(tmp_path / "cut.zip", classes_of()).read_bytes()
    end = int(keep * len(whole)) if 0 < keep < 1 else int(keep)
    (tmp_path / "cut.zip").write_bytes(whole[:end])
    found, items = opened(tmp_path)
    assert [item.path for item in items] == ["good.zip/cat/1.png"]
    assert found.listing.bad == {"cut.zip": "damaged or cut short: File is not a zip file"}
    (tmp_path / "good.zip").unlink()
    with pytest.raises(InputError, match=r"cut\.zip: damaged or cut short"):
        opened(tmp_path)


@pytest.mark.parametrize("seed", range(40))
def test_damage_anywhere_is_named_and_ends_nothing(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    whole = pack(tmp_path / "a.zip", classes_of()).read_bytes()
    damaged = bytearray(whole)
    start = whole.index(b"PK\1\2") if seed % 2 else 0  # in the central directory, or anywhere
    for at in rng.integers(start, len(whole), 1 + seed % 5):
        damaged[at] ^= int(rng.integers(1, 256))
    (tmp_path / "a.zip").write_bytes(damaged)
    pack(tmp_path / "good.zip", {"cow/1.png": PNG})
    found, items = opened(tmp_path)
    good = [item.data for item in items if item.path.startswith("a.zip") and not item.reason]
    assert set(good) <= set(IMAGES) and len(good) == len(set(good))
    assert (
        found.listing.bad
        or len([item for item in items if item.path.startswith("a.zip")]) + len(found.listing.ignored) >= 1
    )
    assert any(item.data == PNG for item in items)


def test_an_archive_behind_other_bytes(tmp_path: Path) -> None:
    whole = pack(tmp_path / "a.zip", classes_of()).read_bytes()
    (tmp_path / "a.zip").write_bytes(b"#!/bin/sh unpacks itself\n" * 50 + whole)
    assert len(labels(tmp_path)) == 12 and not any(item.reason for item in opened(tmp_path)[1])
