"""A refused run of jobs/prepare.py leaves an earlier run's finished dataset as it is."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from pipeline import storage
from pipeline.cluster.pool import in_process
from pipeline.data import shards
from pipeline.data.index import open_splits
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.errors import InputError
from tests.data.common import encoded, write_folder

IMAGES = encoded(40)
LISTS = ("quarantine.jsonl", "ignored.jsonl", "manifest.json", "README.md")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ActorPool", lambda *_, **__: in_process)


def run(source: Path, output: str, **settings: object) -> None:
    prepare(PrepareConfig(output, input=str(source), image_size=12, **settings))  # type: ignore[arg-type]


def beside(output: str) -> dict[str, bytes]:
    """Return the files that a reader sees beside a dataset's shards, by name."""
    return {name: storage.read_bytes(storage.join(output, name)) for name in LISTS}


def spoil(source: Path) -> None:
    for i in range(9):
        (source / f"bad{i}.png").write_bytes(b"<html>404</html>")
    (source / "notes.txt").write_text("new")


def other_settings(source: Path, output: str) -> None:
    spoil(source)
    with pytest.raises(InputError, match="now it is 8"):
        prepare(PrepareConfig(output, input=str(source), image_size=8))


def too_many_bad(source: Path, output: str) -> None:
    spoil(source)
    with pytest.raises(InputError, match=r"9 of 49 .*parts/quarantine\.jsonl: bad0\.png"):
        run(source, output)


def none_good(source: Path, output: str) -> None:
    for path in source.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"40 of 40 .*parts/quarantine\.jsonl"):
        run(source, output)


@pytest.mark.parametrize("refused", [other_settings, too_many_bad, none_good])
@pytest.mark.parametrize("store", ["local", "memory"])
def test_the_lists_of_a_refused_run_do_not_replace_those_of_the_finished_one(
    store: str, refused: Callable[[Path, str], None], tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "in", IMAGES)
    (source / "about.txt").write_text("old")
    output = str(tmp_path / "out") if store == "local" else f"memory://{tmp_path.name}/out"
    run(source, output)
    before = beside(output)
    refused(source, output)
    assert beside(output) == before
    assert sum(index.rows for index in open_splits(output).indexes.values()) == 40
    if store == "memory":
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_the_list_of_a_refused_run_is_there_until_one_is_finished(tmp_path: Path) -> None:
    source, output = write_folder(tmp_path / "in", IMAGES), tmp_path / "out"
    run(source, str(output))
    too_many_bad(source, str(output))
    refused = output / "parts" / "quarantine.jsonl"
    assert len(refused.read_text().splitlines()) == 9
    run(source, str(output), max_bad_fraction=0.5)
    assert not refused.exists() and len((output / "quarantine.jsonl").read_text().splitlines()) == 9


@pytest.mark.parametrize("change", ["ignored", "bad", "added"])
@pytest.mark.parametrize("at", [*LISTS, "shards"])
def test_no_manifest_stands_beside_lists_of_another_state(
    change: str, at: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wherever the run is interrupted, it leaves the former state, the new state, or no finished dataset."""
    source, output = write_folder(tmp_path / "in", IMAGES), tmp_path / "out"
    run(source, str(output), max_bad_fraction=0.5)
    former = beside(str(output))
    name, data = {"ignored": ("a.txt", b"x"), "bad": ("a.png", b"x"), "added": ("a.png", IMAGES[0] + b"x")}[
        change
    ]
    (source / name).write_bytes(data)
    write = storage.write_atomic

    def fail(uri: str, data: bytes) -> None:
        if uri == str(output / at) or (at == "shards" and ".shard" in uri):
            raise KeyboardInterrupt
        write(uri, data)

    monkeypatch.setattr(storage, "write_atomic", fail)
    with contextlib.suppress(KeyboardInterrupt):
        run(source, str(output), max_bad_fraction=0.5)
    monkeypatch.undo()
    if (output / "manifest.json").exists():
        now = beside(str(output))
        entries = len(now["ignored.jsonl"].splitlines()), len(now["quarantine.jsonl"].splitlines())
        manifest = json.loads(now["manifest.json"])
        assert now == former or entries == (sum(manifest["ignored"].values()), manifest["quarantined"])
    else:
        with pytest.raises(InputError, match="has not finished it"):
            open_splits(str(output))
