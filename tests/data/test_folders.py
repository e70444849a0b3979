"""Folders of image files: images, classes and splits."""

import errno
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.data.labels import class_numbers
from pipeline.data.sources.folder import is_folder
from pipeline.data.sources.parts import Request
from pipeline.data.sources.registry import open_source
from pipeline.data.sources.tree import open_tree
from pipeline.errors import InputError
from pipeline.redact import printable
from tests.data.common import encode, picture
from tests.data.reading import PNG, labels, opened, put, splits


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run as a user without root's permission to read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# Images among the files.


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "avif", "img", "", "PNG", "jpeg2", "tiff", "webp", "bin"])
def test_images_are_told_by_what_is_in_them(suffix: str, tmp_path: Path) -> None:
    kind = {"avif": "AVIF", "tiff": "TIFF", "webp": "WEBP", "jfif": "JPEG", "JPE": "JPEG"}.get(suffix, "PNG")
    data = encode(picture(1), kind)
    put(tmp_path, f"cat/a.{suffix}".rstrip("."), data=data)
    put(tmp_path, "cat/notes.txt", "cat/noimage", data=b"some words")
    found, items = opened(tmp_path)
    assert found.source == "folder" and is_folder(found.tree)
    assert [(item.data, item.label) for item in items] == [(data, "cat")]
    assert found.listing.ignored == dict.fromkeys(["cat/notes.txt", "cat/noimage"], "not an image")


@pytest.mark.parametrize(
    "content", [b"<html>404</html>", b"", b"\x89PNG\r\n\x1a\n", b"\0\0\0\x18ftypheic\0\0\0\0mif1"]
)
@pytest.mark.parametrize("name", ["bad.png", "bad.JPG", "bad.heic"])
def test_what_is_called_an_image_stays_one_whatever_it_holds(
    name: str, content: bytes, tmp_path: Path
) -> None:
    put(tmp_path, name, data=content)
    found, items = opened(put(tmp_path, "good.png"))
    assert {item.path: item.data for item in items} == {name: content, "good.png": PNG}
    assert not found.listing.ignored and not found.listing.bad


def test_a_folder_without_images_says_so(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "b/c", "d.json", data=b"{}")
    assert not is_folder(open_tree(str(tmp_path)))
    with pytest.raises(InputError, match="holds no images"):
        open_source("auto", str(tmp_path), Request(10))


def test_one_file_and_a_pattern_are_sources_too(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "a/2.png", "b/1.png", "c.txt")
    assert labels(tmp_path / "a" / "1.png") == {"1.png": None}
    assert labels(tmp_path / "*" / "1.png") == {"a/1.png": "a", "b/1.png": "b"}


# Files that can't be read.


def test_files_that_may_not_be_read_say_so(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "a/2.png", "b/3.jpg", "b/4")
    for name in ("a/2.png", "b/3.jpg", "b/4"):
        (tmp_path / name).chmod(0)
    tmp_path.chmod(0o755)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    with as_nobody():
        found, items = opened(tmp_path)
    reasons = {item.path: (item.data, item.reason) for item in items}
    denied = "can't be read: permission denied"
    assert reasons == {"a/1.png": (PNG, ""), "a/2.png": (b"", denied), "b/3.jpg": (b"", denied)}
    assert "b/4" in found.listing.bad and "denied" in found.listing.bad["b/4"].lower()


@pytest.mark.parametrize("how", ["removed", "link to nothing", "link to itself"])
def test_files_that_went_since_they_were_listed_say_so(how: str, tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "a/2.png")
    part = open_source("folder", str(tmp_path), Request(10)).listing.parts[0]
    path = tmp_path / "a" / "2.png"
    path.unlink()
    if how != "removed":
        path.symlink_to(path if how == "link to itself" else "nothing")
    found = {item.path: (item.data, item.reason) for item in part.read()}
    words = {
        "removed": "no longer exists",
        "link to nothing": "a link to nothing",
        "link to itself": "leads to itself",
    }
    assert found["a/1.png"] == (PNG, "")
    assert found["a/2.png"][0] == b"" and words[how] in found["a/2.png"][1]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_what_the_storage_fails_at_is_no_damage(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = open_source("folder", str(put(tmp_path, "a.png")), Request(10)).listing.parts[0]

    def fail(uri: str) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(storage, "read_bytes", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        list(part.read())


def test_links_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "else", "x/1.png", "2.png")
    root = put(tmp_path / "data", "cat/0.png")
    (root / "dog").symlink_to(tmp_path / "else" / "x")
    (root / "cat" / "2.png").symlink_to(tmp_path / "else" / "2.png")
    (root / "cat" / "gone.png").symlink_to("nothing")
    (root / "cat" / "up").symlink_to(root)
    found, items = opened(root)
    assert {i.path: i.label for i in items} == {"cat/0.png": "cat", "cat/2.png": "cat", "dog/1.png": "dog"}
    assert found.listing.bad == {"cat/gone.png": "a link to nothing"}
    assert found.listing.ignored == {"cat/up": "a link to one of its own parent folders"}


# Names.

ODD = (
    b"caf\xe9",
    'it\'s "x"',
    "[a]",
    "a*b?",
    "#1",
    "%41",
    "a b ",
    "new\nline",
    "~",
    "~root",
    "a;b,c",
    "ÄÖ😀",
    "a\\b",
    "s3:",
    "x::y",
)


@pytest.mark.parametrize("name", ODD, ids=repr)
def test_odd_names_are_names_like_others(name: str | bytes, tmp_path: Path) -> None:
    text = os.fsdecode(name)
    put(tmp_path, f"{text}/{text}.png", f"{text}/1.png", "other/A.png")
    shown = printable(text)
    assert labels(tmp_path) == {
        f"{shown}/{shown}.png": shown,
        f"{shown}/1.png": shown,
        "other/A.png": "other",
    }
    assert opened(tmp_path)[0].listing.classes == tuple(sorted([shown, "other"]))
    pa.array(list(labels(tmp_path)))  # Arrow can store the labels
    inner = opened(tmp_path / text)[1]
    assert {item.path for item in inner} == {f"{shown}.png", "1.png"} and {i.label for i in inner} == {None}


@pytest.mark.parametrize("name", ["007", "-1", "1.0", "null", "nan"])
def test_a_folder_is_a_class_of_that_very_name(name: str, tmp_path: Path) -> None:
    found, items = opened(put(tmp_path, f"{name}/1.png", "zebra/2.png"))
    number = class_numbers(found.listing.classes or ())
    assert {item.path: (found.listing.classes or ())[number(item.label) or 0] for item in items} == {
        f"{name}/1.png": name,
        "zebra/2.png": "zebra",
    }


# Classes, splits and parts.


def test_classes_are_folders_below_the_root(tmp_path: Path) -> None:
    put(tmp_path, "0.png", "a/1.png", "a/b/2.png", "c/3.png")
    assert labels(tmp_path) == {"0.png": None, "a/1.png": "a", "a/b/2.png": "a/b", "c/3.png": "c"}
    assert opened(tmp_path)[0].listing.classes == ("a", "a/b", "c")
    assert set(labels(tmp_path, label_column="none").values()) == {None}


@pytest.mark.parametrize("wrapper", ["", "wrap/", "a/train/"])
@pytest.mark.parametrize(
    "names",
    [
        {"train": "train", "test": "test"},
        {"Training": "train", "val": "validation"},
        {"train2017": "train", "val2017": "validation"},
    ],
    ids=str,
)
def test_folders_that_are_splits_are_no_classes(names: dict[str, str], wrapper: str, tmp_path: Path) -> None:
    for folder in names:
        put(
            tmp_path,
            *(f"{wrapper}{folder}/{c}/{i}.png" for c in ("cat", "dog") for i in range(15)),
            f"{wrapper}{folder}/x.png",
        )
    put(tmp_path, f"{wrapper}note.txt", data=b"words")
    found, items = opened(tmp_path, 8)
    assert splits(found) == Counter(dict.fromkeys(names.values(), 31))
    assert Counter(item.label for item in items) == {"cat": 30, "dog": 30, None: 2}
    assert found.listing.classes == ("cat", "dog")
    for part in found.listing.parts:
        assert all(names[name.removeprefix(wrapper).split("/")[0]] == part.split for name in part.names)


def test_images_beside_splits_are_named(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "test/a/2.png", "extra/3.png", "4.png", "other/b/5.png")
    found, items = opened(tmp_path)
    assert {item.path for item in items} == {"train/a/1.png", "test/a/2.png"}
    beside = "lies beside the splits test, train, in none of them"
    assert found.listing.ignored == dict.fromkeys(["4.png", "extra/3.png", "other/b/5.png"], beside)


def test_a_split_may_lie_in_a_folder_of_its_own_name(tmp_path: Path) -> None:
    for split in ("train", "test"):
        put(tmp_path, *(f"{split}/{split}/{c}/{i}.png" for c in ("cat", "dog") for i in range(3)))
    found, items = opened(tmp_path)
    assert Counter(item.label for item in items) == {"cat": 6, "dog": 6}
    assert splits(found) == {"train": 6, "test": 6}
    put(tmp_path, "train/train/val/1.png", "train/owl/1.png")  # now train and val are classes
    assert {"train/cat", "train/val", "owl", "cat"} < {item.label for item in opened(tmp_path)[1]}


@pytest.mark.parametrize("others", [("cat", "dog"), ("owl",), ("trainer", "tests")])
def test_a_class_may_be_called_as_a_split(others: tuple[str, ...], tmp_path: Path) -> None:
    names = ("train", *others)
    found, items = opened(put(tmp_path, *(f"{name}/1.png" for name in names)))
    assert {item.label for item in items} == set(names) and splits(found) == {"": len(names)}
