"""Corner cases: outputs that somebody changed, odd names, labels of damaged images, images beside splits."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.cluster.pool import in_process
from pipeline.config import Source
from pipeline.data import shards
from pipeline.data.generated import read_manifest
from pipeline.data.index import open_splits
from pipeline.data.shards import Manifest, PrepareConfig, prepare
from pipeline.errors import InputError
from tests.data.common import CLASSES, encoded, tar_bytes, write_folder

IMAGES = encoded(60)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ActorPool", lambda *_, **__: in_process)


def run(source: Path | str, output: Path | str, size: int = 12, split: tuple[str, ...] = ()) -> Manifest:
    config = PrepareConfig(
        str(output), input=str(source), image_size=size, split=split, rows_per_shard=20, max_bad_fraction=0.5
    )
    return prepare(config)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "parts"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def said(text: str) -> str:
    (line,) = [line for line in text.splitlines() if " is " in line]
    return line


def lose_shard(output: Path) -> None:
    min((output / "data").iterdir()).unlink()


def lose_decoded(output: Path) -> None:
    for file in (*output.glob("parts/*.shard"), *output.glob("parts/*-000.arrow")):
        file.unlink()


def damage_records(output: Path) -> None:
    for file in (*output.glob("parts/*.shard"), *output.glob("parts/" + "[0-9a-f]" * 40 + ".json")):
        file.write_bytes(file.read_bytes()[:9])


def cut_decoded(output: Path) -> None:
    for file in (*output.glob("parts/*.shard"), *output.glob("parts/*-000.arrow")):
        file.write_bytes(file.read_bytes()[:-3])


def move(output: Path) -> None:
    shutil.move(output, output.with_name("moved"))


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("harm", [lose_shard, lose_decoded, damage_records, cut_decoded, move])
def test_an_output_in_which_files_are_missing_damaged_or_moved_is_made_whole(
    harm: Callable[[Path], None], grown: bool, tmp_path: Path
) -> None:
    source, output = write_folder(tmp_path / "in", IMAGES[:50]), tmp_path / "out"
    run(source, output)
    harm(output)
    output = output if output.exists() else tmp_path / "moved"
    if grown:
        write_folder(source, IMAGES)
    run(source, output)
    run(source, tmp_path / "fresh")
    assert contents(output) == contents(tmp_path / "fresh")


def test_images_that_were_decoded_with_other_channels_are_decoded_anew(tmp_path: Path) -> None:
    source, rng = tmp_path / "in", np.random.default_rng(0)
    source.mkdir()
    np.savez(source / "a.npz", arr_0=rng.integers(0, 256, (10, 8, 8), np.uint8))
    assert run(source, tmp_path / "out", 0).image["channels"] == 1
    np.savez(source / "b.npz", arr_0=rng.integers(0, 256, (10, 8, 8, 3), np.uint8))
    assert run(source, tmp_path / "out", 0).image["channels"] == 3
    run(source, tmp_path / "fresh", 0)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("place", ["data", "data/train-00000.parquet", "data/*.parquet", "parts"])
def test_an_input_that_the_output_would_overwrite_is_refused(place: str, tmp_path: Path) -> None:
    file = tmp_path / "data" / "train-00000.parquet"
    file.parent.mkdir()
    pq.write_table(pa.table({"image": pa.array(IMAGES[:5], pa.binary())}), file)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="where this job writes"):
        run(tmp_path / place, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("pattern", ["*", "o*", "**", "[a-z]*"])
@pytest.mark.parametrize("store", ["", "memory://"])
def test_an_output_that_a_pattern_of_the_input_would_match_is_refused(
    store: str, pattern: str, tmp_path: Path
) -> None:
    root = f"{store}{tmp_path}"
    for i, data in enumerate(IMAGES[:5]):
        storage.write_atomic(f"{root}/old/{i}.png", data)
    for output in ("out", "out/deeper"):
        with pytest.raises(
            InputError, match=r"^--output \S+ lies inside --input \S+: choose a folder beside it$"
        ):
            run(f"{root}/{pattern}", f"{root}/{output}")
    assert sum(split.rows for split in run(f"{root}/old/*.png", f"{root}/old/out").splits.values()) == 5
    storage.remove_folder(root)


@pytest.mark.parametrize("given", ["", "*", "p*"])
def test_prepared_data_in_a_folder_that_is_given_is_read_once(given: str, tmp_path: Path) -> None:
    run(write_folder(tmp_path / "in", IMAGES[:30]), tmp_path / "all" / "prepared")
    splits = open_splits(f"{tmp_path / 'all'}/{given}".rstrip("/"), 12)
    assert {name: index.rows for name, index in splits.indexes.items()} == {
        name: index.rows for name, index in open_splits(str(tmp_path / "all" / "prepared")).indexes.items()
    }
    assert "what jobs/prepare.py keeps for its next run" in splits.found


@pytest.mark.parametrize("output", ["memory://{}/out", "memory:///{}/out", "memory://{}/out/"])
def test_the_shards_stay_however_the_store_spells_the_output(output: str, tmp_path: Path) -> None:
    output = output.format(tmp_path.name)
    run(write_folder(tmp_path / "in", IMAGES[:50]), output)
    manifest = run(tmp_path / "in", output)
    files = {storage.name(uri) for uri in storage.list_files(storage.join(output, "data"))}
    assert files == {storage.name(shard.file) for split in manifest.splits.values() for shard in split.shards}
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_labels_of_damaged_images_name_classes_in_both_ways(tmp_path: Path) -> None:
    images = [*IMAGES[:20], IMAGES[20][:60]]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(tar_bytes(images, names=("cat", "dog", "owl")))
    (tmp_path / "in" / "b.tar").write_bytes(tar_bytes([IMAGES[21][:60]], 99, names=("zebra",)))
    assert run(tmp_path / "in", tmp_path / "out").quarantined == 2
    classes = [index.image.classes for index in open_splits(str(tmp_path / "in"), 12).indexes.values()]
    classes += [index.image.classes for index in open_splits(str(tmp_path / "out")).indexes.values()]
    assert set(classes) == {("cat", "dog", "owl", "zebra")}


def test_numbers_too_large_for_classes_are_none_in_both_ways(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array(IMAGES[:5], pa.binary()), "label": [10**12 + i for i in range(5)]})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    assert run(tmp_path / "in", tmp_path / "out").image["classes"] == []
    assert open_splits(str(tmp_path / "in"), 12)["train"].image.classes == ()


def test_the_line_says_what_is_held_out_and_what_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, first, last in (("train-0", 0, 30), ("val-0", 30, 40), ("more", 40, 50)):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(IMAGES[first:last], first))
    splits = open_splits(str(tmp_path), 12, split=("train",))
    assert splits.indexes.keys() == {"train", "validation"}
    line = said(capsys.readouterr().err)
    assert ", held out by content)" in line
    assert "split validation not used" in line and "images in none of the splits not used" in line


def test_the_line_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a\nb"
    source.mkdir()
    table = pa.table({"image": pa.array(IMAGES[:4], pa.binary()), "label": ["c\nd", "e"] * 2})
    pq.write_table(table, source / "a.parquet")
    run(source, tmp_path / "out")
    assert "(c\\nd, e)" in said(capsys.readouterr().err)


@pytest.mark.parametrize("source", ["arrow", "huggingface", "webdataset", "idx", "cifar", "npz", "zip"])
def test_a_source_that_is_not_there_is_named(source: Source, tmp_path: Path) -> None:
    write_folder(tmp_path / "in", IMAGES[:3])
    with pytest.raises(InputError, match=f"holds nothing that --source {source} reads"):
        prepare(PrepareConfig(str(tmp_path / "out"), source, str(tmp_path / "in"), image_size=12))


def test_archives_without_images_are_said_to_hold_none(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(InputError, match=r"^--input .*: holds no images$"):
        run(tmp_path / "a.tar", tmp_path / "out")
    with pytest.raises(InputError, match=r"^--data .*: holds no images that can be used$"):
        open_splits(str(tmp_path / "a.tar"), 12)


def test_a_folder_called_as_the_home_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("~") == os.environ["HOME"]
    write_folder(tmp_path / "~", IMAGES[:9])
    assert storage.absolute("~") == str(tmp_path / "~")
    run("~", tmp_path / "out")
    found = Counter(json.loads((tmp_path / "out/manifest.json").read_text())["image"]["classes"])
    assert found == {"cat": 1, "dog": 1, "owl": 1}


@pytest.mark.parametrize("content", ['["0.png"]', "null", '{"name": "pets"}', '{"format": "coco"}'])
def test_a_manifest_of_others_is_a_file_like_any_other(content: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", IMAGES[:10])
    (source / "manifest.json").write_text(content)
    run(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "ignored.jsonl").read_text())["path"] == "manifest.json"
    assert sum(index.rows for index in open_splits(str(source)).indexes.values()) == 10
    assert read_manifest(str(source), "--samples") is None


def test_an_output_with_data_of_others_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    source, output = write_folder(tmp_path / "in", encoded(12)), tmp_path / "out"
    (output / "data").mkdir(parents=True)
    (output / "data" / "train-00099.parquet").write_bytes(b"theirs")
    with pytest.raises(InputError, match="holds data that this job did not write"):
        prepare(PrepareConfig(str(output), input=str(source), image_size=12))
    assert [path.name for path in output.rglob("*") if path.is_file() and path.name != "lock.json"] == [
        "train-00099.parquet"
    ]


@pytest.mark.parametrize("stray", ["docs/fig.png", "fig.png", "ds/fig.png", "ds/more/fig.png"])
def test_an_image_beside_the_splits_does_not_hide_them(tmp_path: Path, stray: str) -> None:
    images = encoded(30)
    for name, some in (("train", images[:20]), ("val", images[20:29])):
        write_folder(tmp_path / "in" / "ds" / name, some)
    path = tmp_path / "in" / stray
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(images[29])
    splits = open_splits(str(tmp_path / "in"))
    assert {name: index.rows for name, index in splits.indexes.items()} == {"train": 20, "validation": 9}
    assert splits["train"].image.classes == CLASSES
    assert f"{stray}" in splits.found


def test_what_is_in_none_of_the_splits_is_left_alone(tmp_path: Path) -> None:
    images = encoded(60)
    for name, some in (("train-0", images[:30]), ("val", images[30:40]), ("extra", images[40:])):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(some))
    splits = open_splits(str(tmp_path))
    assert {name: index.rows for name, index in splits.indexes.items()} == {"train": 30, "validation": 10}
    assert "none of the splits not used" in splits.found
    everything = open_splits(str(tmp_path), split=("all",))
    assert {name: index.rows for name, index in everything.indexes.items()} == {"train": 50, "validation": 10}


@pytest.mark.parametrize("inside", ["", "good/"])
def test_splits_inside_of_classes_are_kept(tmp_path: Path, inside: str) -> None:
    for i, data in enumerate(encoded(30)):
        path = tmp_path / ("bottle", "cable")[i % 2] / ("train", "train", "test")[i % 3] / inside / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    splits = open_splits(str(tmp_path))
    assert {name: index.rows for name, index in splits.indexes.items()} == {"train": 20, "validation": 10}
    assert splits["train"].image.classes == tuple(
        f"{name}/{inside}".rstrip("/") for name in ("bottle", "cable")
    )


def test_a_folder_that_is_as_long_as_the_splits_is_beside_them(tmp_path: Path) -> None:
    images = encoded(30)
    write_folder(tmp_path / "ds" / "train", images[:20])
    write_folder(tmp_path / "ds" / "val", images[20:28])
    write_folder(tmp_path / "xx" / "train", images[28:])
    splits = open_splits(str(tmp_path))
    assert {name: index.rows for name, index in splits.indexes.items()} == {"train": 20, "validation": 8}
