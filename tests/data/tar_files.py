"""Small tars for tests, and the checks that hold for the items of any tar."""

import io
import pickle
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

from pipeline.data.sources.parts import Item
from pipeline.data.sources.tars import TarPart
from tests.data.common import encoded

IMAGES = encoded(40)
A, B, C = IMAGES[:3]
Members = Iterable[tuple[str, bytes] | tarfile.TarInfo]


def tar_of(members: Members, **options: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def part_of(folder: Path, members: Members | bytes, **options: object) -> TarPart:
    (folder / "a.tar").write_bytes(members if isinstance(members, bytes) else tar_of(members, **options))
    return TarPart(str(folder), ("a.tar",))


def read(folder: Path, members: Members | bytes, **options: object) -> list[Item]:
    """Return all items of a tar, after checks that hold for any tar: cuts, pickled size, reading by position."""
    part = part_of(folder, members, **options)
    items = list(part.read())
    cuts = list(part.cut(3))
    assert [item for cut in cuts for item in cut.read()] == items
    assert all(len(pickle.dumps(cut)) < 700 + 4 * sum(len(one.name) for one in cut.members) for cut in cuts)
    rows = random.Random(len(items)).choices(range(len(items)), k=5 if items else 0)
    assert list(part.read(rows)) == [items[row] for row in rows]
    assert all(list(cut.read([0])) == items[n * 3 : n * 3 + 1] for n, cut in enumerate(cuts))
    assert len({item.path for item in items}) == len(items)
    assert all(item.path.isprintable() and item.path.startswith("a.tar") for item in items)
    assert all(bool(item.data) != bool(item.reason) for item in items)
    return items


def labels(folder: Path, members: Members | bytes, **options: object) -> list[str | None]:
    items = read(folder, members, **options)
    assert not [item.reason for item in items if item.reason]
    return [item.label for item in items]
