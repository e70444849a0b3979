"""The disk cache keeps remote data for the second epoch: the same bytes, in bounded space, after any kill."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import disk_cache, storage, stretches
from pipeline.cluster import forking
from pipeline.data.sources import parquet_files
from pipeline.data.sources.parquet import read_row_group
from pipeline.data.sources.parts import Request
from pipeline.data.sources.registry import open_source
from tests.data.common import encoded, tar_bytes, write_parquet
from tests.data.weather import Weather
from tests.jobs.common import ROOT
from tests.jobs.forked import start_forked

Use = Callable[[float], None]


def forget() -> None:
    """Empty the caches in memory, as in a process that has just started."""
    for cache in (disk_cache._cache, stretches._opened):
        cache.cache_clear()
    parquet_files.forget_files()


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """A function that makes this process use the folder `cache` with the given bytes of space."""

    def start(room: float) -> None:
        for name, value in disk_cache.environment(str(tmp_path / "cache"), room / 1e9).items():
            monkeypatch.setenv(name, value)
        forget()

    yield start
    monkeypatch.undo()
    forget()


def files(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache").rglob("*") if path.is_file() and path.name != "lock"]


def content(number: int, size: int = 1000) -> bytes:
    return random.Random(number).randbytes(size)


def never() -> bytes:
    raise AssertionError("fetched again")


def test_a_second_epoch_asks_for_no_content(bucket: str, weather: Weather, tmp_path: Path, use: Use) -> None:
    images = encoded(80, 24, 24)
    write_parquet(tmp_path / "data", images, rows_per_group=10)
    for path in (tmp_path / "data").iterdir():
        storage.write_atomic(f"{bucket}/parquet/{path.name}", path.read_bytes())
    storage.write_atomic(f"{bucket}/tars/a.tar", tar_bytes(images))
    groups = [(f"{bucket}/parquet/train-{file}.parquet", group) for file in range(2) for group in range(4)]
    (tar,) = open_source("webdataset", f"{bucket}/tars", Request(20)).listing.parts
    cuts = list(tar.cut(20))

    def epoch() -> list[bytes]:
        with ThreadPoolExecutor(8) as pool:
            tables = list(pool.map(lambda one: read_row_group(*one), groups))
        found = [data for table in tables for data in table["bytes"].to_pylist()]
        return found + [item.data for cut in cuts for item in cut.read() if isinstance(item.data, bytes)]

    assert epoch() == images * 2 and not (tmp_path / "cache").exists()
    use(1e9)
    assert epoch() == images * 2
    for _ in range(2):
        forget()  # as another process of the node would
        weather.calm()
        assert epoch() == images * 2
        assert not weather.sent
    storage.write_atomic(f"{bucket}/tars/a.tar", tar_bytes(images[::-1]))
    forget()
    assert [item.data for cut in cuts for item in cut.read()] != images


def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path, use: Use) -> None:
    use(200_000)
    for number in range(400):
        assert disk_cache.kept(f"{number}", 1000, lambda number=number: content(number)) == content(number)
        if number % 50 == 0:
            assert sum(path.stat().st_size for path in files(tmp_path)) <= 200_000
    assert 150 < len(files(tmp_path)) < 200
    for number in range(150):
        assert disk_cache.kept(f"{number}", 1000, never) == content(number)
    for path in files(tmp_path):
        os.utime(path, (1, 1))  # not used for a day
    assert disk_cache.kept("7", 1000, never) == content(7)
    for number in range(400, 800):
        disk_cache.kept(f"{number}", 1000, lambda number=number: content(number))
    assert 150 < len(files(tmp_path)) < 200
    for number in (7, *range(400, 500)):
        assert disk_cache.kept(f"{number}", 1000, never) == content(number)
    use(50_000)  # less space: the next process that writes notices it
    disk_cache.kept("one more", 100, lambda: content(1, 100))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 50_000


def test_half_of_the_room_saves_about_half_of_the_reading(use: Use) -> None:
    use(200_000)
    fetches = list[int]()

    def fetch(number: int) -> bytes:
        fetches.append(number)
        return content(number)

    for _ in range(3):
        fetches.clear()
        for number in random.sample(range(400), 400):
            disk_cache.kept(f"{number}", 1000, lambda number=number: fetch(number))
    assert len(fetches) < 250


def test_what_is_used_is_not_the_oldest(tmp_path: Path, use: Use) -> None:
    use(1e6)
    disk_cache.kept("a", 1000, lambda: content(1))
    (path,) = files(tmp_path)
    os.utime(path, (1, 1))
    disk_cache.kept("a", 1000, never)
    assert path.stat().st_mtime > time.time() - 60


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: bytes(len(data)),
        lambda data: data[:500] + b"\0" + data[501:],
        lambda data: data + b"\0",
    ],
)
def test_a_damaged_file_is_fetched_again(tmp_path: Path, use: Use, damage: Callable[[bytes], bytes]) -> None:
    use(1e6)
    disk_cache.kept("a", 1000, lambda: content(1))
    (path,) = files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert disk_cache.kept("a", 1000, lambda: content(1)) == content(1)
    assert disk_cache.kept("a", 1000, never) == content(1)


def test_a_disk_that_fails_costs_only_the_network(tmp_path: Path, use: Use) -> None:
    (tmp_path / "cache").write_text("no folder")
    use(1e6)
    assert [disk_cache.kept("a", 1000, lambda: content(1)) for _ in range(2)] == [content(1)] * 2


def test_what_is_not_what_was_asked_for_is_not_kept(tmp_path: Path, use: Use) -> None:
    use(1e6)
    assert disk_cache.kept("short", 1000, lambda: b"abc") == b"abc"
    assert disk_cache.kept("large", 10**5, lambda: content(1, 10**5)) == content(1, 10**5)
    assert not files(tmp_path)


WRITER = """
import random, sys
from pipeline import disk_cache
while True:
    number = random.randrange(400)
    data = random.Random(number).randbytes(1000)
    assert disk_cache.kept(str(number), 1000, lambda: data) == data
"""


@pytest.mark.slow
def test_processes_that_share_it_may_be_killed_at_any_moment(tmp_path: Path, use: Use) -> None:
    environment = (
        os.environ | {"PYTHONPATH": str(ROOT)} | disk_cache.environment(str(tmp_path / "cache"), 2e-4)
    )
    for _ in range(3):
        writers = [subprocess.Popen([sys.executable, "-c", WRITER], env=environment) for _ in range(3)]
        time.sleep(random.uniform(1.0, 2.0))
        assert [writer.poll() for writer in writers] == [None] * 3
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    found = files(tmp_path)
    assert sum(path.stat().st_size for path in found) <= 200_000 and len(found) > 50
    use(200_000)
    for number in range(400):
        assert disk_cache.kept(f"{number}", 1000, lambda number=number: content(number)) == content(number)
    abandoned = tmp_path / "cache" / "aa" / "some.partial"
    abandoned.parent.mkdir(exist_ok=True)
    abandoned.write_bytes(b"abc")
    os.utime(abandoned, (1, 1))
    forget()
    disk_cache.kept("one more", 1000, lambda: content(1))
    assert not abandoned.exists()


@pytest.mark.system
def test_a_training_fills_it(bucket: str, tmp_path: Path) -> None:
    """Each worker is a new Python, as on a cluster that somebody else has started."""
    images = encoded(64, 8, 8)
    write_parquet(tmp_path / "data", images)
    for path in (tmp_path / "data").iterdir():
        storage.write_atomic(f"{bucket}/{path.name}", path.read_bytes())
    flags = (
        "--data", bucket, "--output", tmp_path / "run", "--steps", 2, "--batch-size", 8, "--cache-dir", "cache",
        "--model-channels", 8, "--channel-multipliers", 1, "--head-channels", 4, "--attention-resolutions",
    )  # fmt: skip
    done = start_forked("train", *flags, home=tmp_path, **{forking.SWITCH: "0"}).outcome(timeout=300)
    assert done.code == 0, done.stderr
    assert len(files(tmp_path)) > 2
