"""All images of tars are read, whole, in small parts and by position, from disk and from remote storage."""

import gzip
import io
import json
import lzma
import random
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import webdataset

from pipeline import storage
from pipeline.data.images import open_image
from pipeline.data.sources.parts import Request, SourceListing
from pipeline.data.sources.registry import open_source
from pipeline.data.sources.tars import TarPart, is_tars, list_tars
from pipeline.data.sources.tree import open_tree
from pipeline.errors import InputError
from tests.data.common import picture
from tests.data.tar_files import IMAGES, A, B, part_of, read, special, tar_of


@pytest.mark.parametrize("count", [1, 7, 40])
def test_webdataset_itself_reads_the_same(tmp_path: Path, count: int) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i, data in enumerate(IMAGES[:count]):
            beside = {"cls": i % 3} if i % 2 else {"json": {"label": f"class {i % 3}", "caption": "x"}}
            writer.write({"__key__": f"some/key{i:03d}", "png": data, "txt": "a caption", **beside})
    theirs = {
        f"a.tar/{sample['__key__']}.png": (
            sample["png"],
            sample["cls"].decode() if "cls" in sample else json.loads(sample["json"])["label"],
        )
        for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False, empty_check=False)
    }
    items = read(tmp_path, (tmp_path / "a.tar").read_bytes())
    assert {item.path: (item.data, item.label) for item in items} == theirs
    assert [item.data for item in items] == IMAGES[:count]


def listing_of(folder: Path, files: dict[str, bytes]) -> SourceListing:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    tree = open_tree(str(folder))
    assert is_tars(tree) == any(name.lower().endswith(".tar") for name in files)
    listing = list_tars(tree, Request(50))
    assert listing.used == {name for part in listing.parts for name in part.names}
    return listing


def test_a_tar_that_is_none_is_bad(tmp_path: Path) -> None:
    good = tar_of([("a.png", A)])
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("a.png", A)
    files = {
        "gz.tar": (gzip.compress(good), "`gunzip`"),
        "x.tar.gz": (gzip.compress(good), "`gunzip`"),
        "y.TGZ": (gzip.compress(good), "`gunzip`"),
        "xz.tar": (lzma.compress(good), "`unxz`"),
        "z.txz": (lzma.compress(good), "`unxz`"),
        "zst.tar": (b"\x28\xb5\x2f\xfd" + bytes(600), "`unzstd`"),
        "zip.tar": (zipped.getvalue(), "zip file"),
        "lfs.tar": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "git lfs pull"),
        "short.tar": (b"404", "not a tar file: too short"),
    }
    listing = listing_of(
        tmp_path,
        {"good.tar": good, "UPPER.TAR": good, "zero.tar": b""} | {n: d for n, (d, _) in files.items()},
    )
    assert [part.names for part in listing.parts] == [("UPPER.TAR",), ("good.tar",)]
    assert listing.ignored == {"zero.tar": "empty"}
    assert listing.bad.keys() == files.keys()
    assert all(words in listing.bad[name] for name, (_, words) in files.items())
    assert listing.classes is None


def test_only_tars_that_cannot_be_read_leave_no_parts(tmp_path: Path) -> None:
    listing = listing_of(tmp_path, {f"{i}.tar": gzip.compress(tar_of([("a.png", A)])) for i in range(3)})
    assert not listing.parts
    assert Counter(listing.bad.values()) == {"a tar compressed with gzip: decompress it with `gunzip`": 3}
    with pytest.raises(InputError, match="`gunzip`"):
        open_source("auto", str(tmp_path), Request(50))
    for path in tmp_path.iterdir():
        path.rename(path.with_suffix(".tar.gz"))
    with pytest.raises(InputError, match="`gunzip`"):
        open_source("auto", str(tmp_path), Request(50))
    (tmp_path / "good.tar").write_bytes(tar_of([("a.png", A)]))
    opened = open_source("auto", str(tmp_path), Request(50))
    assert (opened.source, len(opened.listing.parts), len(opened.listing.bad)) == ("webdataset", 1, 3)


@pytest.mark.parametrize(
    "content", [b"", bytes(1024), bytes(10240), tar_of([]), tar_of([special("x", tarfile.DIRTYPE)])]
)
def test_a_tar_without_images(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path, content) == []
    assert list(part_of(tmp_path, content).cut(5)) == []


@pytest.mark.parametrize("content", [b"<html>" * 1000, random.Random(0).randbytes(5000), A * 20])
def test_what_is_no_tar_at_all_is_one_item(tmp_path: Path, content: bytes) -> None:
    (item,) = read(tmp_path, content)
    assert item.reason == f"not a tar file: no member in its {len(content)} bytes"


def test_splits_by_the_names_of_the_tars(tmp_path: Path) -> None:
    tars = ("train/0.tar", "train/1.tar", "val/0.tar", "test-0000.tar")
    listing = listing_of(tmp_path, dict.fromkeys(tars, tar_of([("a.png", A), ("a.cls", b"1")])))
    found = {part.names[0]: part.split for part in listing.parts}
    assert found == {
        "train/0.tar": "train",
        "train/1.tar": "train",
        "val/0.tar": "validation",
        "test-0000.tar": "test",
    }
    assert all(cut.split == part.split for part in listing.parts for cut in part.cut(1))
    items = [item for part in listing.parts for item in part.read()]
    assert sorted(item.path for item in items) == sorted(f"{name}/a.png" for name in tars)


def test_a_tar_that_went_away_is_its_own_fault_and_a_broken_disk_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = part_of(tmp_path, [("a.png", A), ("b.png", B)])
    (cut,) = part.cut(5)
    (tmp_path / "a.tar").rename(tmp_path / "b.tar")
    assert list(part.cut(5)) == [part]
    assert [tuple(item) for item in part.read()] == [
        ("a.tar", b"", None, "can't be read: it no longer exists")
    ]
    assert [(i.path, i.data) for i in cut.read()] == [("a.tar/a.png", b""), ("a.tar/b.png", b"")]
    (tmp_path / "a.tar").symlink_to("a.tar")
    assert [item.reason for item in cut.read([1])] == ["can't be read: a link that leads to itself"]
    (tmp_path / "a.tar").unlink()
    shutil.copy(tmp_path / "b.tar", tmp_path / "a.tar")
    with monkeypatch.context() as patch:
        for error in (OSError(5, "Input/output error"), TimeoutError("slow"), ConnectionResetError("gone")):
            patch.setattr(Path, "open", lambda *_, error=error: (_ for _ in ()).throw(error))
            for reading in (part.read, cut.read, lambda: part.cut(5)):
                with pytest.raises(type(error)):
                    list(reading())
    (tmp_path / "a.tar").write_bytes(b"")
    assert {item.reason for item in cut.read()} == {"its bytes are no longer in the tar"}


def test_every_byte_on_s3_is_fetched_about_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    noise = random.Random(0).randbytes(100_000)
    content = tar_of([*((f"{i}.png", data + noise) for i, data in enumerate(IMAGES)),
                      *((f"{i}.cls", str(i % 3).encode()) for i in range(40))])  # fmt: skip
    storage.write_atomic(f"{bucket}/a.tar", content)
    fetched = list[int]()
    real = s3fs.S3FileSystem._call_s3

    async def counted(self, method, *args, **kwargs):  # type: ignore[no-untyped-def]
        answer = await real(self, method, *args, **kwargs)
        if method == "get_object":
            fetched.append(answer["ContentLength"])
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    part = TarPart(bucket, ("a.tar",))
    items = list(part.read())
    assert [(item.data, item.label) for item in items] == [
        (d + noise, str(i % 3)) for i, d in enumerate(IMAGES)
    ]
    assert sum(fetched) == len(content)
    fetched.clear()
    assert [item for cut in part.cut(10) for item in cut.read()] == items
    assert sum(fetched) == len(content)
    cuts = list(part.cut(10))
    fetched.clear()
    assert [item for cut in cuts for item in cut.read()] == items
    assert len(fetched) == len(cuts) == 4 and sum(fetched) < len(content)
    fetched.clear()
    assert list(cuts[3].read([9, 0, 9])) == [items[39], items[30], items[39]]
    assert len(fetched) == 2 and sum(fetched) < 2.1 * len(noise)
    storage.remove(f"{bucket}/a.tar")
    assert {item.reason for item in cuts[0].read()} == {"can't be read: it no longer exists"}


def test_a_picture_comes_out_as_it_went_in(tmp_path: Path) -> None:
    items = read(tmp_path, [(f"{i}.png", data) for i, data in enumerate(IMAGES)])
    for i, item in enumerate(items):
        assert isinstance(item.data, bytes)
        assert open_image(item.data).tobytes() == picture(i).tobytes()
