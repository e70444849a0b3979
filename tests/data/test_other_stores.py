"""Reading gs:// and hf:// and writing gs:// with the real clients, against local servers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import lock, storage
from pipeline.data.groups import read_rows
from pipeline.data.index import DatasetIndex, open_splits
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.data.sources import parquet_files
from pipeline.data.sources.parquet import read_row_group
from pipeline.data.sources.parquet_files import open_parquet
from pipeline.data.sources.tree import open_tree
from pipeline.errors import InputError
from pipeline.stretches import open_file, read_stretch
from tests.data.common import encoded, write_folder, write_parquet, write_tars
from tests.data.gcs import gcs_server
from tests.data.hub import hub
from tests.data.weather import Weather

IMAGES = encoded(40)
WRITERS = {"folder": write_folder, "tars": write_tars, "parquet": write_parquet}


@pytest.fixture(scope="module")
def google() -> Iterator[tuple[str, Weather]]:
    with gcs_server("tests") as found:
        yield found


def upload(folder: Path, uri: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_atomic(f"{uri}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def contents(sent: list[tuple[str, int]]) -> list[int]:
    """Return the bytes of each answer that was a file's content."""
    return [size for path, size in sent if not path.startswith("/storage/v1/b/")]


def rows(index: DatasetIndex) -> list[tuple[bytes, int]]:
    tables = [read_rows(group, np.arange(group.rows)) for group in index.groups]
    return sorted((r["bytes"], r["label"]) for table in tables for r in table.to_pylist())


@pytest.mark.parametrize("kind", WRITERS)
def test_raw_data_is_found_to_be_what_it_is_on_a_disk(
    kind: str, google: tuple[str, Weather], tmp_path: Path
) -> None:
    here = WRITERS[kind](tmp_path / "data", IMAGES)
    upload(here, f"{google[0]}/raw-{kind}")
    expected = open_splits(str(here))
    with hub(here) as (hugging_face, _):
        for uri in (f"{google[0]}/raw-{kind}", hugging_face):
            parquet_files.forget_files()
            found = open_splits(uri)
            assert found["train"].fingerprint == expected["train"].fingerprint, uri
            for name, index in expected.indexes.items():
                assert rows(found[name]) == rows(index), uri


@pytest.mark.usefixtures("prepared_here")
def test_prepare_reads_and_writes_there_as_on_a_disk(google: tuple[str, Weather], tmp_path: Path) -> None:
    here = write_folder(tmp_path / "data", IMAGES)
    options = {"source": "folder", "image_size": 12, "rows_per_shard": 20}
    local = prepare(PrepareConfig(str(tmp_path / "out"), input=str(here), **options))
    upload(here, f"{google[0]}/in")
    there = prepare(PrepareConfig(f"{google[0]}/out", input=f"{google[0]}/in", **options))
    assert there.splits == local.splits
    with hub(here) as (hugging_face, _):
        assert (
            prepare(PrepareConfig(str(tmp_path / "hf"), input=hugging_face, **options)).splits == local.splits
        )
        with pytest.raises(InputError, match="no such folder"):
            open_splits(f"{hugging_face}/nothing")
    assert rows(open_splits(f"{google[0]}/out")["train"]) == rows(open_splits(str(tmp_path / "out"))["train"])
    shard = f"{google[0]}/out/{local.splits['train'].shards[0].file}"
    storage.write_atomic(shard, b"cut")  # a truncated shard
    assert (
        prepare(PrepareConfig(f"{google[0]}/out", input=f"{google[0]}/in", **options)).splits == local.splits
    )
    assert len(storage.read_bytes(shard)) == local.splits["train"].shards[0].bytes


def test_a_row_group_is_one_request_of_its_own_size(google: tuple[str, Weather], tmp_path: Path) -> None:
    here = write_parquet(tmp_path / "data", [*IMAGES] * 8, files=1)
    name = next(here.glob("*.parquet")).name
    upload(here, f"{google[0]}/groups")
    with hub(here) as (hugging_face, fetched):
        weather = google[1]
        for uri, sent in ((f"{google[0]}/groups/{name}", weather.sent), (f"{hugging_face}/{name}", fetched)):
            parquet_files.forget_files()
            file = open_parquet(uri)
            sent.clear()
            for number in range(file.metadata.num_row_groups):
                used = sum(
                    file.metadata.row_group(number).column(i).total_compressed_size
                    for i in range(file.metadata.num_columns)
                )
                assert read_row_group(uri, number).num_rows
                sizes = contents(sent)
                assert len(sizes) == 1 and sizes[0] <= 1.02 * used + 100, (uri, sent)
                sent.clear()


def test_a_stretch_is_just_its_bytes_and_a_rewritten_file_has_another_version(
    google: tuple[str, Weather], tmp_path: Path
) -> None:
    content = bytes(range(256)) * 1000
    (tmp_path / "file").write_bytes(content)
    storage.write_atomic(f"{google[0]}/file", content)
    with hub(tmp_path) as (hugging_face, fetched):
        for uri, sent in ((f"{google[0]}/file", google[1].sent), (f"{hugging_face}/file", fetched)):
            sent.clear()
            assert read_stretch(uri, 300, 900) == content[300:900]
            with open_file(uri) as file:
                file.seek(-5, 2)
                assert file.read(5) == content[-5:]
            assert contents(sent) == [600, 5]
        before = [open_tree(uri).files["file"].version for uri in (google[0], hugging_face)]
        (tmp_path / "file").write_bytes(content[::-1])
        storage.write_atomic(f"{google[0]}/file", content[::-1])
        after = [open_tree(uri).files["file"].version for uri in (google[0], hugging_face)]
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_one_driver_holds_an_output_there(
    google: tuple[str, Weather], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.5)
    output = f"{google[0]}/output"
    with lock.locked(output) as lost:
        with pytest.raises(InputError, match="another"), lock.locked(output):
            pass
        assert not lost.is_set()
    with lock.locked(output):
        pass
