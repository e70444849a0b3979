"""Only the needed bytes of remote files are fetched, each once, counted at the server."""

import io
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from pipeline import storage, stretches
from pipeline.config import ImageConfig
from pipeline.data.sources import parquet_files
from pipeline.data.sources.parquet import open_parquet, read_row_group
from pipeline.data.sources.parts import Item, Part, Request
from pipeline.data.sources.registry import open_source
from pipeline.errors import InputError
from pipeline.evaluation.reading import open_samples
from pipeline.stretches import open_file, read_stretch, read_stretches
from tests.data.common import CLASSES, tar_bytes, write_idx
from tests.data.weather import Weather

RNG = np.random.default_rng(0)
IMAGES = [b"\x89PNG\r\n\x1a\n" + RNG.bytes(6000) for _ in range(320)]


def fetched(weather: Weather) -> list[int]:
    """Return the bytes of each answer with content since the last call."""
    sizes = [size for path, size in weather.sent if "list-type" not in path]
    weather.sent.clear()
    return sizes


def write_shard(path: Path, images: list[bytes], group: int) -> None:
    rows = [{"image": {"bytes": data, "path": f"{i}.png"}, "label": i % 3} for i, data in enumerate(images)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group, compression="none")


def upload(folder: Path, uri: str) -> int:
    """Upload the files of a folder and return their total bytes."""
    for path in folder.iterdir():
        storage.write_atomic(f"{uri}/{path.name}", path.read_bytes())
    return sum(path.stat().st_size for path in folder.iterdir())


def test_each_row_group_is_one_request_and_each_footer_is_fetched_once(
    bucket: str, weather: Weather, tmp_path: Path
) -> None:
    parquet_files.forget_files()
    files, groups, used = 4, 10, 0
    for number in range(files):
        write_shard(tmp_path / f"{number}.parquet", IMAGES[number * 80 : number * 80 + 80], 8)
        about = pq.read_metadata(tmp_path / f"{number}.parquet")
        used += sum(about.row_group(g).total_byte_size for g in range(groups))
    upload(tmp_path, bucket)
    weather.calm()
    wanted = [(f"{bucket}/{f}.parquet", g) for f in range(files) for g in range(groups)]
    order = [wanted[i] for i in RNG.permutation(len(wanted))]
    with ThreadPoolExecutor(16) as pool:
        tables = dict(zip(order, pool.map(lambda one: read_row_group(*one), order), strict=True))
    found = [data for one in wanted for data in tables[one]["bytes"].to_pylist()]
    assert found == IMAGES[: files * groups * 8]
    sizes = fetched(weather)
    assert len(sizes) == files + files * groups
    assert sum(sizes) - files * parquet_files._FOOTER <= 1.01 * used
    for one in order:
        read_row_group(*one)
    sizes = fetched(weather)
    assert len(sizes) == files * groups and sum(sizes) <= 1.01 * used


@pytest.mark.parametrize("source", ["auto", "samples"])
def test_footers_of_many_files_are_fetched_once_and_together(
    bucket: str, weather: Weather, tmp_path: Path, source: str
) -> None:
    for number in range(64):
        write_shard(tmp_path / f"{number}.parquet", IMAGES[:2], 2)
    upload(tmp_path, bucket)
    parquet_files.forget_files()
    weather.calm()
    weather.delay = 0.1
    if source == "samples":
        assert open_samples(bucket, ImageConfig(12, 3)).rows == 128
    else:
        assert len(open_source("auto", bucket, Request(2)).listing.parts) == 64
    listed = [path for method, path in weather.asked if method == "HEAD" or "list-type" in path]
    assert len(listed) <= 5
    # The detection of the source also reads the first rows of the first files.
    assert len(weather.asked) - len(listed) <= 64 + 4
    assert weather.most >= 12


def test_footers_stay_known_when_many_files_are_read(
    bucket: str, weather: Weather, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        write_shard(tmp_path / f"{number}.parquet", IMAGES[:16], 8)
    upload(tmp_path, bucket)
    uris = [f"{bucket}/{number}.parquet" for number in range(3)]
    parquet_files.forget_files()
    for _ in range(2):
        for uri in uris:
            open_parquet(uri)
            parquet_files._metadata.cache_clear()
    weather.calm()
    assert open_parquet(uris[0]).metadata.num_row_groups == 2 and not fetched(weather)
    write_shard(tmp_path / "0.parquet", IMAGES[:16], 4)
    upload(tmp_path, bucket)
    open_source("huggingface", bucket, Request(4))
    assert open_parquet(uris[0]).metadata.num_row_groups == 4


@pytest.mark.parametrize("size", [0, 3, 8, 100, 70_000])
def test_a_file_that_is_no_parquet_is_not_fetched_whole(bucket: str, weather: Weather, size: int) -> None:
    parquet_files.forget_files()
    storage.write_atomic(f"{bucket}/a.parquet", b"\xff" * size)
    weather.calm()
    with pytest.raises(InputError, match="not a Parquet file"):
        open_parquet(f"{bucket}/a.parquet")
    assert sum(fetched(weather)) <= parquet_files._FOOTER


def test_a_footer_that_is_longer_than_usual(bucket: str, weather: Weather, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [b"x"] * 900, 1)
    size = int.from_bytes((tmp_path / "a.parquet").read_bytes()[-8:-4], "little") + 8
    assert size > parquet_files._FOOTER
    upload(tmp_path, bucket)
    parquet_files.forget_files()
    weather.calm()
    assert open_parquet(f"{bucket}/a.parquet").metadata.num_row_groups == 900
    sizes = fetched(weather)
    assert len(sizes) == 2 and sum(sizes) == size


def sources(folder: Path) -> Iterator[tuple[str, int]]:
    """Write one folder for each kind of file that is read by position. Yield its kind and number of images."""
    images = IMAGES[:160]
    for kind in ("arrow", "cifar", "huggingface", "idx", "npz", "webdataset", "zip"):
        (folder / kind).mkdir()
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(CLASSES))})
    rows = {"image": [{"bytes": data, "path": None} for data in IMAGES], "label": [i % 3 for i in range(320)]}
    dataset = Dataset.from_dict(rows, features=features).with_format("arrow")
    schema = dataset.features.arrow_schema
    with (
        pa.OSFile(str(folder / "arrow" / "data.arrow"), "wb") as file,
        pa.ipc.new_stream(file, schema) as out,
    ):
        for first in range(0, 320, 20):
            out.write_table(dataset[first : first + 20].cast(schema))
    yield "arrow", 320
    (folder / "cifar" / "data_batch_1.bin").write_bytes(b"".join(b"\1" + RNG.bytes(3072) for _ in range(160)))
    yield "cifar", 160
    write_shard(folder / "huggingface" / "a.parquet", images, 20)
    yield "huggingface", 160
    write_idx(folder / "x", RNG.integers(0, 256, (1600, 28, 28), np.uint8), np.arange(1600) % 10)
    import gzip

    for path in (folder / "x").iterdir():
        (folder / "idx" / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    yield "idx", 1600
    np.savez(folder / "npz" / "a.npz", RNG.integers(0, 256, (320, 32, 32, 3), np.uint8), np.arange(320) % 3)
    yield "npz", 320
    (folder / "webdataset" / "a.tar").write_bytes(tar_bytes(images))
    yield "webdataset", 160
    with zipfile.ZipFile(folder / "zip" / "a.zip", "w") as archive:
        for i, data in enumerate(images):
            archive.writestr(f"{CLASSES[i % 3]}/{i}.png", data)
    yield "zip", 160


def size_of(items: list[Item]) -> int:
    return sum(len(item.data) if isinstance(item.data, bytes) else item.data.nbytes for item in items)


@pytest.mark.slow
def test_no_source_fetches_more_than_it_needs(bucket: str, weather: Weather, tmp_path: Path) -> None:
    for kind, count in sources(tmp_path):
        size = upload(tmp_path / kind, f"{bucket}/{kind}")
        weather.calm()
        parts: list[Part] = list(open_source(kind, f"{bucket}/{kind}", Request(20)).listing.parts)  # type: ignore[arg-type]
        listed = sum(fetched(weather))
        if kind == "webdataset":
            parts = [one for part in parts for one in part.cut(20)]
            listed += sum(fetched(weather))
        # Listing must read what lies between the images of a tar, and all of a record batch stream to count its rows.
        assert listed <= (1.7 if kind == "arrow" else 1.01 if kind == "webdataset" else 0.2) * size, kind
        items = [item for part in parts for item in part.read()]
        sizes = fetched(weather)
        assert len(items) == count
        between = len(items) * 2048 if kind == "webdataset" else 0
        assert sum(sizes) - between <= 1.1 * size_of(items), kind
        assert len(sizes) <= (count if kind == "zip" else len(parts) + 2), kind
        some = list(parts[3].read([4, 5]))
        if kind not in ("arrow", "huggingface"):  # these two are read by record batch or row group
            assert sum(fetched(weather)) <= 1.3 * size_of(some), kind


def test_reading_at_places(bucket: str, weather: Weather) -> None:
    data, uri = RNG.bytes(300_000), f"{bucket}/file"
    storage.write_atomic(uri, data)
    weather.calm()
    with open_file(uri) as file:
        file.seek(-100, io.SEEK_END)
        assert file.read() == data[-100:] and file.read(5) == b"" and file.tell() == len(data)
        file.seek(1000)
        file.seek(10, io.SEEK_CUR)
        assert file.read(50) == data[1010:1060] and file.tell() == 1060
        assert fetched(weather) == [100, 50]
    with open_file(uri, ahead=10_000) as file:
        assert [file.read(10) for _ in range(3)] == [data[i : i + 10] for i in (0, 10, 20)]
        assert fetched(weather) == [10_000]
        assert file.read() == data[30:]
    assert read_stretches(uri, [(0, 5), (299_990, 400_000), (7, 9)]) == [data[:5], data[-10:], data[7:9]]
    assert read_stretch(uri, 3, 9) == data[3:9]


@pytest.mark.slow
def test_a_storage_that_fails_for_a_while_is_asked_again(
    bucket: str,
    weather: Weather,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Switch off the clients' own retries of some seconds.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    parquet_files.forget_files()
    write_shard(tmp_path / "a.parquet", IMAGES[:40], 20)
    upload(tmp_path, bucket)
    uri = f"{bucket}/a.parquet"
    expected = read_row_group(uri, 0)
    for fault in ("503", "cut", "refused"):
        weather.storm(fault, 1.0, lambda method, path: method == "GET" and "a.parquet" in path)
        assert read_row_group(uri, 0).equals(expected)
        assert "can't be read: " in capfd.readouterr().err
    monkeypatch.setattr(stretches, "SECONDS", 0.5)
    weather.storm("refused", 60, lambda method, path: "a.parquet" in path)
    with pytest.raises(Exception, match="onnection") as caught:
        read_row_group(uri, 0)
    assert storage.is_storage_error(caught.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_what_no_waiting_mends_fails_at_once(bucket: str, weather: Weather) -> None:
    storage.write_atomic(f"{bucket}/a", b"abc")
    began = time.monotonic()
    with pytest.raises(FileNotFoundError):
        read_stretch(f"{bucket}/b", 0, 5)
    weather.storm("expired", 60, lambda method, path: method == "GET")
    with pytest.raises(PermissionError):
        read_stretch(f"{bucket}/a", 0, 5)
    with pytest.raises(FileNotFoundError):
        read_stretch("/no/such/file", 0, 5)
    assert time.monotonic() - began < 5


def test_a_file_that_was_written_anew_is_not_read_as_the_old_one(bucket: str) -> None:
    storage.write_atomic(f"{bucket}/a", b"abc")
    with open_file(f"{bucket}/a") as file:
        assert file.read(2) == b"ab"
        storage.write_atomic(f"{bucket}/a", b"other")
        began = time.monotonic()
        with pytest.raises(OSError):
            file.read(1)
        assert time.monotonic() - began < 5
