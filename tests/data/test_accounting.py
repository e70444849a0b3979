"""Mutated dataset folders: each given file is used, quarantined or ignored, and listed by name."""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.images import DecodeError, decode
from pipeline.data.sources.parts import Request
from pipeline.data.sources.registry import Opened, open_source
from pipeline.errors import InputError
from pipeline.redact import printable
from tests.data.common import encoded, write_folder, write_parquet, write_tars

IMAGES = encoded(40)
ROUNDS = 12


def write_zip(folder: Path, images: list[bytes]) -> Path:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i, data in enumerate(images):
            archive.writestr(f"{'cat' if i % 2 else 'dog'}/{i}.png", data)
    return folder


def write_splits(folder: Path, images: list[bytes]) -> Path:
    for name, some in (("train", images[:30]), ("val", images[30:35]), ("test", images[35:])):
        write_folder(folder / name, some)
    return folder


WRITERS: dict[str, Callable[[Path, list[bytes]], Path]] = {
    "folder": write_folder,
    "splits": write_splits,
    "webdataset": write_tars,
    "huggingface": write_parquet,
    "zip": write_zip,
}
ODD_NAMES = [
    "a b.png",
    "it's.png",
    "[1].png",
    "50%41.png",
    "~x.jpg",
    "new\nline.png",
    "no_suffix",
    "UPPER.PNG",
    "a.jfif",
]
SIDE_FILES = {
    "README.md": b"# Images",
    ".DS_Store": b"\0\0\0\1Bud1",
    "Thumbs.db": b"\xd0\xcf",
    "notes.txt": b"",
    "page.png": b"<html>404</html>",
    "empty.jpg": b"",
    "__MACOSX/._0.png": b"\0\5\x16\7",
    "data.json": b"{",
    "stats.parquet.tmp": b"x",
}


def mutate(root: Path, rng: np.random.Generator) -> None:
    """Make one change that users or their tools make."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    path = files[int(rng.integers(len(files)))]
    match rng.integers(10):
        case 0:
            path.rename(path.with_name(str(rng.choice(ODD_NAMES))))
        case 1:
            path.rename(path.with_name(os.fsdecode(b"caf\xe9.png")))
        case 2 | 3:
            name = str(rng.choice(list(SIDE_FILES)))
            (path.parent / name).parent.mkdir(exist_ok=True)
            (path.parent / name).write_bytes(SIDE_FILES[name])
        case 4:
            path.write_bytes(path.read_bytes()[: int(rng.integers(path.stat().st_size + 1))])
        case 5:
            (path.parent / f"link{rng.integers(99)}.png").symlink_to(rng.choice(["nowhere", path.name]))
        case 6:
            (path.parent / f"loop{rng.integers(99)}").symlink_to(rng.choice([".", ".."]))
        case 7:
            if not (pipe := path.parent / "pipe.png").exists():
                os.mkfifo(pipe)
        case 8:
            (root / "more" / "deeper").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / "more" / "deeper" / f"copy-{path.name}")
        case 9:
            (root / str(rng.choice(["empty", "train", "test", ".hidden"]))).mkdir(exist_ok=True)


def given(root: Path) -> set[str]:
    """Return the names of all files and links below a folder, including links to a parent folder."""
    found = set()
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        found |= {(here / name).relative_to(root).as_posix() for name in (*files, *links)}
    return found


def check(root: Path, opened: Opened) -> tuple[int, int]:
    """Check the invariant. Return the number of usable images, and the number of names listed as left out."""
    listing = opened.listing
    # Links to folders elsewhere would be followed. All links here lead to a parent folder or to a file.
    for name in given(root):
        assert name in listing.used or printable(name) in listing.ignored or printable(name) in listing.bad, (
            name
        )
    assert not set(listing.ignored) & set(listing.bad)
    assert all(listing.ignored.values()) and all(listing.bad.values())
    items = [item for part in listing.parts for item in part.read()]
    paths = [item.path for item in items]
    assert len(set(paths)) == len(paths)
    for path in [*paths, *listing.ignored, *listing.bad]:
        path.encode()
        assert path.isprintable() and not path.startswith(str(root))
    good = 0
    for item in items:
        assert bool(item.reason) <= (len(item.data) == 0)
        try:
            decode(item.data, 8, 3)
            good += 1
        except DecodeError as error:
            assert item.reason or str(error)
            assert "0x" not in str(error)
    for part in listing.parts:
        count = len(list(part.read()))
        for row in {0, count // 2, count - 1} - {-1}:
            (one,) = part.read([row])
            assert one.path == list(part.read())[row].path
    return good, len(listing.ignored) + len(listing.bad)


@pytest.mark.parametrize("kind", WRITERS)
def test_whatever_was_given_is_used_quarantined_or_ignored(kind: str, tmp_path: Path) -> None:
    rng, used, left = np.random.default_rng(len(kind)), 0, 0
    for number in range(ROUNDS):
        root = WRITERS[kind](tmp_path / str(number), IMAGES)
        for _ in range(rng.integers(1, 8)):
            mutate(root, rng)
        try:
            opened = open_source("auto", str(root), Request(16))
            good, others = check(root, opened)
        except InputError as error:
            assert "\n" not in str(error)
            continue
        again = open_source("auto", str(root), Request(16)).listing
        assert again == opened.listing
        used, left = used + good, left + others
    assert used > 20 * ROUNDS / 2 and left > ROUNDS / 2
