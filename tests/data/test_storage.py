"""Files on any storage are written whole or not at all. A URI that leads nowhere gets a clear line."""

import errno
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.data.groups import read_rows
from pipeline.data.index import open_dataset, open_splits
from pipeline.data.sources.parquet import read_row_group
from pipeline.errors import InputError
from pipeline.patience import arrow_fs
from tests.data.common import encoded, tar_bytes
from tests.data.reading import opened
from tests.data.weather import Weather
from tests.jobs.common import ROOT


def test_the_extra_is_named_when_it_is_missing() -> None:
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(InputError, match=r"gs:// needs .*ray-ddpm\[gcs\]"):
        open_dataset("gs://bucket/images")
    with pytest.raises(InputError, match="floppy"):
        open_dataset("floppy://a/b")


def test_hugging_face_uris_reach_the_hub_and_say_so_when_it_is_not_there() -> None:
    """No hub answers here. The test checks that the URI is understood and that one clear line comes."""
    code = (
        "from pipeline.data.index import open_dataset\nfrom pipeline.errors import InputError\n"
        "try: open_dataset('hf://datasets/someone/images')\n"
        "except InputError as error: print(error)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "hf://datasets/someone/images: can't be read" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_a_bucket_that_is_not_there_is_named(s3: str) -> None:
    with pytest.raises(InputError, match="s3://elsewhere/x"):
        open_dataset("s3://elsewhere/x")
    with pytest.raises(InputError, match="s3://elsewhere/x: can't be written"):
        storage.check_writable("s3://elsewhere/x")


def test_files_on_s3(s3: str) -> None:
    uri = storage.join(s3, "some", "file.bin")
    assert not storage.exists(uri)
    storage.write_atomic(uri, b"abc")
    assert storage.read_bytes(uri) == b"abc"
    assert list(storage.sizes(f"{s3}/some").values()) == [3]
    assert storage.list_files(f"{s3}/some") == storage.list_files(f"{s3}/some/*.bin") == [uri]
    storage.write_atomic(uri, b"abd")
    assert storage.read_bytes(uri) == b"abd"
    storage.check_writable(f"{s3}/some")
    storage.remove(uri)
    assert not storage.exists(uri)


def test_local_writes_leave_nothing_half_done(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file"
    storage.write_atomic(str(target), b"abc")
    target.parent.chmod(0o700)
    (tmp_path / "blocked").mkdir()
    with pytest.raises(OSError, match="directory"):
        storage.write_atomic(str(tmp_path / "blocked"), b"abc")
    assert not list(tmp_path.rglob("*.partial"))


ASKED = {
    "exists": storage.exists,
    "list_files": storage.list_files,
    "list_folders": lambda uri: storage.list_folders(uri, ""),
    "sizes": storage.sizes,
    "read_many": lambda uri: storage.read_many([f"{uri}/deep/x.bin"]),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_storage_that_fails_is_not_an_empty_one(bucket: str, weather: Weather, asked: str) -> None:
    storage.write_atomic(f"{bucket}/deep/x.bin", b"abc")
    assert ASKED[asked](bucket)
    weather.storm("expired", 60, lambda method, path: True)
    with pytest.raises(InputError, match=rf"{bucket}\S*: can't be read: "):
        ASKED[asked](bucket)
    weather.calm()
    assert ASKED[asked](bucket)


@pytest.mark.parametrize("asked", ASKED)
def test_a_disk_that_fails_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    storage.write_atomic(f"{tmp_path}/deep/x.bin", b"abc")

    def fail(path: object, *_: object, **__: object) -> object:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    with monkeypatch.context() as away:
        for name in ("stat", "scandir", "open"):
            away.setattr(os, name, fail)
        away.setattr("builtins.open", fail)
        with pytest.raises(InputError, match=r"can't be read: .*Stale file handle"):
            ASKED[asked](str(tmp_path))
    assert ASKED[asked](str(tmp_path))


def test_a_folder_below_that_can_not_be_listed_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_atomic(f"{tmp_path}/deep/x.bin", b"abc")
    scandir = os.scandir

    def fail(path: str) -> object:
        if path.endswith("deep"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    for ask in (storage.sizes, storage.list_files):
        with pytest.raises(InputError, match=r"can't be read: .*Input/output error"):
            ask(str(tmp_path))


def test_what_is_not_there_is_empty(root: str) -> None:
    assert storage.sizes(f"{root}/none") == storage.read_many([f"{root}/none"]) == {}
    assert storage.list_folders(f"{root}/none", "") == []


# As a pattern or a chain of file systems, each of these names would match the decoys.
ODD_NAMES = ("a[1]", "a*", "a?b", "[!z]1", "{a,b}", "a#b", "a::b1", "a%20b", "a b ü")
DECOYS = ("a1", "ab", "axb", "b1", "a")


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty folder."""
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_taken_as_it_is_before_it_is_a_pattern(root: str, name: str) -> None:
    for decoy in DECOYS:
        storage.write_atomic(f"{root}/{decoy}/x.bin", b"decoy")
    folder, file = f"{root}/{name}", f"{root}/{name}/{name}.bin"
    decoys = storage.sizes(root)
    assert not storage.exists(folder) and not storage.exists(f"{folder}/x.bin")
    storage.remove_folder(folder)
    assert storage.sizes(root) == decoys
    storage.write_atomic(file, b"abc")
    assert storage.create(f"{folder}/y.txt", b"") and not storage.create(f"{folder}/y.txt", b"")
    table = pa.table({"image": [b"abc"]})
    with pa.BufferOutputStream() as buffer:
        pq.write_table(table, buffer)
    storage.write_atomic(f"{folder}/{name}.parquet", buffer.getvalue().to_pybytes())
    assert read_row_group(f"{folder}/{name}.parquet", 0)["bytes"].to_pylist() == [b"abc"]
    storage.remove(f"{folder}/{name}.parquet")
    assert storage.exists(folder) and storage.exists(file) and not storage.exists(f"{folder}/x.bin")
    assert storage.read_bytes(file) == storage.read_many([file])[file] == b"abc"
    assert storage.list_files(folder) == sorted([file, f"{folder}/y.txt"])
    assert storage.list_files(file) == storage.list_files(f"{folder}/*.bin") == [file]
    assert storage.sizes(folder) == {file: 3, f"{folder}/y.txt": 0}
    assert storage.list_folders(root, name) == [folder]
    assert storage.absolute(folder) == folder and storage.name(folder) == name
    storage.check_writable(folder)
    moved = f"{root}/{name}-moved/{name}"
    storage.move(file, moved)
    assert storage.read_bytes(moved) == b"abc" and not storage.exists(file)
    storage.remove(moved)
    storage.remove_folder(folder)
    assert not storage.exists(folder)
    storage.write_atomic(f"{folder}/deep/z.bin", b"")
    arrow, path = arrow_fs(folder, lambda do, what: do())
    arrow.delete_dir(path)
    assert not storage.exists(folder)
    assert storage.sizes(root) == decoys


def test_what_is_not_there_by_its_name_may_be_a_pattern(root: str) -> None:
    for name in ("a1", "a2", "b[1]", "b1"):
        storage.write_atomic(f"{root}/{name}/x1.bin", b"")
    assert storage.list_files(f"{root}/a[12]/*.bin") == [f"{root}/a{n}/x1.bin" for n in (1, 2)]
    assert storage.list_files(f"{root}/b[1]/x[1].bin") == [f"{root}/b[1]/x1.bin"]
    assert storage.list_files(f"{root}/a?") == [f"{root}/a{n}/x1.bin" for n in (1, 2)]
    assert storage.exists(f"{root}/a[12]/*", pattern=True) and not storage.exists(f"{root}/a[12]/*")
    assert not storage.exists(f"{root}/a[34]/*", pattern=True)
    for nothing in ("a[34]/*", "c"):
        with pytest.raises(InputError, match="no such file or folder"):
            storage.list_files(f"{root}/{nothing}")


def test_keys_that_no_folder_could_hold(bucket: str) -> None:
    """An empty object marks a folder. A key with // behind the folder can't be named, so it is bad and says why."""
    image = encoded(1)[0]
    fs, folder = storage.open_fs(bucket)
    name, _, prefix = folder.partition("/")
    for key, data in (("", b""), ("a/", b""), ("a/0.png", image), ("a//1.png", image), ("/2.png", image)):
        fs.call_s3("put_object", Bucket=name, Key=f"{prefix}/{key}", Body=data)
    found, items = opened(bucket)
    assert {item.path: item.reason for item in items} == {"a/0.png": "", "a//1.png": ""}
    assert not found.listing.ignored
    assert list(found.listing.bad) == ["/2.png"] and "//" in found.listing.bad["/2.png"]


def test_data_in_a_folder_of_an_odd_name(root: str) -> None:
    """The data is found, read and split as in any other folder, and the folder that its name matches stays unread."""
    images = encoded(14)
    for place, some in (("a[1]", images[:10]), ("a1", images[10:])):
        for i, data in enumerate(some):
            storage.write_atomic(f"{root}/{place}/c[0]/{i}*.png", data)
        storage.write_atomic(f"{root}/tars/{place}.tar", tar_bytes(some))
    for uri in (f"{root}/a[1]", f"{root}/tars/a[1].tar", f"{root}/a[1]/c[0]/*.png"):
        splits = open_splits(uri).indexes.values()
        found = [read_rows(group, np.arange(group.rows)) for split in splits for group in split.groups]
        assert sorted(data for table in found for data in table["bytes"].to_pylist()) == sorted(images[:10])
    assert open_dataset(f"{root}/a[1]").image.classes == ("c[0]",)
