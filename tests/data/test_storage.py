"""Files on any storage: whole or not at all, and a clear line where a URI leads nowhere."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data.index import open_dataset
from pipeline.errors import InputError
from tests.jobs.common import ROOT


def test_the_extra_is_named_when_it_is_missing() -> None:
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(InputError, match=r"gs:// needs .*ray-ddpm\[gcs\]"):
        open_dataset("gs://bucket/images")
    with pytest.raises(InputError, match="floppy"):
        open_dataset("floppy://a/b")


def test_hugging_face_uris_reach_the_hub_and_say_so_when_it_is_not_there() -> None:
    """Nothing answers here: what counts is that the URI is understood, and one clear line."""
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
    storage.check_writable(f"{s3}/some")
    storage.remove(uri)
    assert not storage.exists(uri)


@pytest.mark.parametrize("place", ["local", "s3"])
@pytest.mark.parametrize("odd", ["a[1]", "a*", "what?", "a{1,2}", "[draft] x"])
def test_a_name_is_taken_literally_where_it_exists(
    odd: str, place: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    root = str(tmp_path) if place == "local" else request.getfixturevalue("s3")
    folder, other = storage.join(root, odd), storage.join(root, "a1")
    mine, theirs = storage.join(folder, "x[1].png"), storage.join(other, "x1.png")
    storage.write_atomic(mine, b"mine")
    storage.write_atomic(theirs, b"theirs")
    assert storage.exists(folder) and storage.exists(mine)
    assert storage.list_files(folder, (".png",)) == storage.list_files(mine) == [mine]
    assert storage.read_bytes(mine) == b"mine"
    assert storage.list_folders(root, odd) == [folder]
    moved = storage.join(folder, "deep", "y[2].png")
    storage.move(mine, moved)
    assert storage.list_files(folder) == [moved] and not storage.exists(mine)
    storage.remove_folder(folder)
    assert not storage.exists(moved) and storage.read_bytes(theirs) == b"theirs"
    storage.remove_folder(folder)
    storage.write_atomic(moved, b"mine")
    arrow, path = storage.arrow_fs(folder)
    arrow.delete_dir(path)
    assert not storage.exists(moved) and storage.read_bytes(theirs) == b"theirs"
    # Where nothing has that name, it is a pattern.
    assert storage.list_files(storage.join(root, "a[0-9]", "*.png")) == [theirs]
    assert storage.list_files(storage.join(root, "a[0-9]")) == [theirs]
    assert storage.exists(storage.join(root, "a?"), pattern=True) and not storage.exists(
        storage.join(root, "a?")
    )
    assert not storage.exists(storage.join(root, "b?"), pattern=True)


def test_local_writes_leave_nothing_half_done(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file"
    storage.write_atomic(str(target), b"abc")
    target.parent.chmod(0o700)
    (tmp_path / "blocked").mkdir()
    with pytest.raises(OSError, match="directory"):
        storage.write_atomic(str(tmp_path / "blocked"), b"abc")
    assert not list(tmp_path.rglob("*.partial"))
