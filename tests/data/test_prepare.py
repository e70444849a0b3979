"""Prepared shards follow the Hugging Face convention, have the same bytes after any interruption, and list damage."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from pipeline import storage
from pipeline.data import decoded, shards
from pipeline.data.groups import read_rows
from pipeline.data.images import decode
from pipeline.data.index import open_dataset
from pipeline.data.shards import Manifest, PrepareConfig, prepare
from pipeline.data.sources.parts import Request
from pipeline.data.sources.registry import open_source
from pipeline.errors import InputError
from tests.data.common import (
    CLASSES,
    encode,
    encoded,
    label_of,
    picture,
    tar_bytes,
    write_folder,
    write_idx,
    write_parquet,
    write_tars,
)
from tests.jobs.common import command, environment, run_job

IMAGES = encoded(200, 16, 12)
RECORDS = "parts/" + "[0-9a-f]" * 40 + ".json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source") / "folder", IMAGES)


def config(source: Path, output: Path | str, **changes: object) -> PrepareConfig:
    plain = PrepareConfig(
        str(output), "folder", str(source), image_size=12, rows_per_shard=60, rows_per_group=16
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def prepared(cluster: None, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The output folder and manifest of a preparation by a pool of actors."""
    output = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SMALL_BYTES", 0)
        return output, prepare(config(source, output))


def contents(folder: Path) -> dict[str, bytes]:
    names = [
        p for p in folder.rglob("*") if p.is_file() and p.parent.name != "parts" and p.suffix != ".partial"
    ]
    return {str(p.relative_to(folder)): p.read_bytes() for p in names}


def all_rows(uri: str, split: str) -> dict[bytes, int]:
    index = open_dataset(uri, split, 12)
    tables = [read_rows(group, np.arange(group.rows)) for group in index.groups]
    return {b: n for t in tables for b, n in zip(t["bytes"].to_pylist(), t["label"].to_pylist(), strict=True)}


def test_datasets_opens_the_folder(
    prepared: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, manifest = prepared
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    assert {name: len(part) for name, part in loaded.items()} == {
        name: split.rows for name, split in manifest.splits.items()
    }
    assert loaded["train"].features["label"].names == list(CLASSES)
    row = loaded["train"][0]
    assert row["image"].size == (12, 12)
    number = int(Path(row["image"].filename or loaded["train"].data["image"][0].as_py()["path"]).stem)
    assert row["label"] == label_of(number)
    assert (np.asarray(row["image"]) == decode(IMAGES[number], 12, 3)).all()


def test_the_manifest_tells_the_truth(prepared: tuple[Path, Manifest]) -> None:
    folder, manifest = prepared
    assert manifest.image == {"size": 12, "channels": 3, "classes": list(CLASSES)}
    assert sum(split.rows for split in manifest.splits.values()) == 200
    for split in manifest.splits.values():
        for shard in split.shards:
            data = (folder / shard.file).read_bytes()
            assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
            assert sum(shard.row_groups) == shard.rows
            assert max(shard.row_groups) <= 16
    pixels = np.stack([decode(d, 12, 3) for d in all_rows(str(folder), "train")]) / 255
    np.testing.assert_allclose(manifest.mean, pixels.mean((0, 1, 2)), atol=1e-9)
    np.testing.assert_allclose(manifest.std, pixels.std((0, 1, 2)), atol=1e-9)


@pytest.mark.usefixtures("prepared_here")
def test_the_same_bytes_again_and_in_pieces(
    prepared: tuple[Path, Manifest], source: Path, tmp_path: Path
) -> None:
    folder, _ = prepared
    prepare(config(source, tmp_path))
    assert contents(tmp_path) == contents(folder)
    # A killed run leaves some decoded parts and some shards, the last of each without its record, and no manifest.
    records = sorted((tmp_path / "parts").glob("?" * 40 + ".json"))
    shard = tmp_path / "parts" / "train-00001.shard"
    for path in (tmp_path / "manifest.json", *records[:2], shard):
        path.unlink()
    with pytest.raises(InputError, match="not finished"):
        open_dataset(str(tmp_path))
    ages = {p: p.stat().st_mtime_ns for p in [*tmp_path.rglob("*.parquet"), *records[2:]]}
    again = {p for p in ages if p.name.startswith((records[0].stem, records[1].stem, shard.stem))}
    prepare(config(source, tmp_path))
    assert contents(tmp_path) == contents(folder)
    assert {p for p in ages if p.stat().st_mtime_ns != ages[p]} == again


@pytest.mark.usefixtures("prepared_here")
def test_resharding_moves_no_image_between_the_splits(
    prepared: tuple[Path, Manifest], source: Path, tmp_path: Path
) -> None:
    folder, manifest = prepared
    other = prepare(config(source, tmp_path, rows_per_shard=25, rows_per_group=10))
    assert other.fingerprint == manifest.fingerprint
    held_out = all_rows(str(folder), "validation")
    assert 5 <= len(held_out) <= 40
    assert all_rows(str(tmp_path), "validation") == held_out
    assert all_rows(str(tmp_path), "train") == all_rows(str(folder), "train")


@pytest.mark.usefixtures("prepared_here")
def test_the_rows_of_a_group_follow_from_the_images_unless_they_are_given(
    source: Path, tmp_path: Path
) -> None:
    for given, most in ((0, 16), (7, 7)):
        manifest = prepare(config(source, tmp_path / str(given), rows_per_shard=1000, rows_per_group=given))
        groups = manifest.splits["train"].shards[0].row_groups
        assert set(groups[:-1]) == {most} and manifest.settings["rows_per_group"] == given
    with pytest.raises(InputError, match="begun with rows_per_group = 7, now it is 0"):
        prepare(config(source, tmp_path / "7", rows_per_shard=1000, rows_per_group=0))


def test_a_folder_keeps_its_settings(prepared: tuple[Path, Manifest], source: Path) -> None:
    with pytest.raises(InputError, match="image_size = 12, now it is 8"):
        prepare(config(source, prepared[0], image_size=8))


@pytest.mark.usefixtures("prepared_here")
def test_bad_images_are_counted_and_named(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", IMAGES[:120])
    (source / "cat" / "empty.png").write_bytes(b"")
    (source / "dog" / "half.png").write_bytes(IMAGES[0][: len(IMAGES[0]) // 2])
    with pytest.raises(InputError, match=r"2 of 122 .*quarantine.jsonl"):
        prepare(config(source, tmp_path / "out"))
    manifest = prepare(config(source, tmp_path / "out", max_bad_fraction=0.05))
    assert manifest.quarantined == open_dataset(str(tmp_path / "out")).quarantined == 2
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    named = {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}
    assert named.keys() == {"cat/empty.png", "dog/half.png"}
    assert named["cat/empty.png"] == "empty"


def test_what_a_reader_refuses_on_a_node_is_one_line_here(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is intact when it is listed, and damaged when a worker reads it."""
    monkeypatch.setattr(shards, "SMALL_BYTES", 0)
    pixels = np.zeros((6, 4, 4), np.uint8)
    write_idx(tmp_path / "in", pixels, np.arange(6))
    settings = PrepareConfig(str(tmp_path / "out"), "idx", str(tmp_path / "in"))
    assert open_source(settings.source, settings.input, Request(10)).listing.parts
    (tmp_path / "in" / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bdamaged")
    with pytest.raises(
        InputError, match=r"^\S+train-images-idx3-ubyte.gz: damaged, download it again"
    ) as error:
        prepare(settings)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("prepared_here")
def test_the_longer_side_can_be_kept(source: Path, tmp_path: Path) -> None:
    prepare(config(source, tmp_path, crop="none"))
    assert open_dataset(str(tmp_path)).image.size == 12
    loaded = datasets.Image().decode_example(
        {"bytes": next(iter(all_rows(str(tmp_path), "train"))), "path": None}
    )
    assert loaded.size == (16, 12)


@pytest.mark.usefixtures("prepared_here")
@pytest.mark.parametrize("kind", ["webdataset", "huggingface", "digits"])
def test_other_sources(kind: str, tmp_path: Path) -> None:
    writer = {"webdataset": write_tars, "huggingface": write_parquet}.get(kind)
    source = str(writer(tmp_path / "in[1]", IMAGES)) if writer else ""
    size = 12 if writer else 0
    manifest = prepare(PrepareConfig(str(tmp_path / "out[1]"), kind, source, image_size=size))  # type: ignore[arg-type]
    assert sum(split.rows for split in manifest.splits.values()) == (200 if writer else 1797)
    names = {"webdataset": ["0", "1", "2"], "huggingface": list(CLASSES)}
    assert manifest.image["classes"] == names.get(kind, [str(n) for n in range(10)])


@pytest.mark.usefixtures("prepared_here")
def test_texts_beside_the_images_of_a_tar_are_the_classes(tmp_path: Path) -> None:
    names = ("owl", "cat", "dog")
    source, output = str(write_tars(tmp_path / "in", IMAGES, names=names)), str(tmp_path / "out")
    manifest = prepare(PrepareConfig(output, "webdataset", source, image_size=12))
    assert manifest.image["classes"] == sorted(names)
    assert manifest.quarantined == 0
    expected = Counter(sorted(names).index(names[label_of(i)]) for i in range(200))
    assert (
        Counter([*all_rows(output, "train").values(), *all_rows(output, "validation").values()]) == expected
    )
    assert open_dataset(source, image_size=12).image.classes == tuple(sorted(names))


@pytest.mark.usefixtures("prepared_here")
def test_s3_in_and_out(s3: str, tmp_path: Path) -> None:
    source, rows = write_folder(tmp_path / "in", IMAGES[:60]), {"rows_per_shard": 20, "rows_per_group": 8}
    for path in source.rglob("*.png"):
        storage.write_atomic(f"{s3}/in[1]/{path.relative_to(source)}", path.read_bytes())
    manifest = prepare(config(source, f"{s3}/out[1]", input=f"{s3}/in[1]", **rows))
    fingerprint = prepare(config(source, tmp_path / "out", **rows)).fingerprint
    local = contents(tmp_path / "out")
    assert len(local) > 3
    remote = {
        name.removeprefix(f"{s3}/out[1]/"): storage.read_bytes(name)
        for name in storage.list_files(f"{s3}/out[1]")
        if "/parts/" not in name
    }
    assert {n: d for n, d in remote.items() if n.startswith("data/")} == {
        n: d for n, d in local.items() if n.startswith("data/")
    }
    assert manifest.fingerprint == open_dataset(f"{s3}/out[1]").fingerprint == fingerprint
    storage.write_atomic(f"{s3}/tars/a.tar", tar_bytes(IMAGES[:100]))
    assert set(all_rows(f"{s3}/tars", "train")) < set(IMAGES[:100])


@dataclass
class Counted:
    """Prepares in this process and counts the images that are decoded."""

    source: Path
    output: Path
    decoded: list[int] = field(default_factory=list)

    def __call__(self, **changes: object) -> Manifest:
        self.decoded.append(0)
        return prepare(config(self.source, self.output, **changes))


@pytest.fixture
def counted(prepared_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    run = Counted(write_folder(tmp_path / "in", IMAGES[:100]), tmp_path / "out")

    def count(*arguments: Any, **options: Any) -> np.ndarray:
        run.decoded[-1] += 1
        return decode(*arguments, **options)

    monkeypatch.setattr(decoded, "decode", count)
    return run


def add(source: Path) -> None:
    for i, data in enumerate(IMAGES[100:160], 100):
        (source / CLASSES[label_of(i)] / f"{i:04d}.png").write_bytes(data)


def remove(source: Path) -> None:
    for path in sorted(source.rglob("*.png"))[::3]:
        path.unlink()


def replace_some(source: Path) -> None:
    for path, data in zip(sorted(source.rglob("*.png"))[:7], IMAGES[150:], strict=False):
        path.write_bytes(data)


def rename(source: Path) -> None:
    """Rename a class, and one image of another class."""
    (source / "cat").rename(source / "lynx")
    first = min((source / "dog").iterdir())
    first.rename(first.with_name("first.png"))


@pytest.mark.parametrize(("change", "new"), [(add, 60), (remove, 0), (replace_some, 7), (rename, 34)])
def test_after_a_change_the_same_command_gives_what_a_fresh_run_gives_and_decodes_what_is_new(
    counted: Counted, tmp_path: Path, change: Callable[[Path], None], new: int
) -> None:
    counted()
    change(counted.source)
    counted()
    assert counted.decoded[0] == 100 and counted.decoded[1] <= new  # a renamed image may move to another part
    mine = contents(counted.output)
    counted()
    assert counted.decoded[2] == 0
    assert contents(counted.output) == mine
    counted.output = tmp_path / "fresh"
    counted()
    assert counted.decoded[-1] == len(list(counted.source.rglob("*.png")))
    assert contents(counted.output) == mine
    images = {data for split in ("train", "validation") for data in all_rows(str(counted.output), split)}
    assert len(images) == counted.decoded[-1]


def test_a_refused_run_goes_on_once_the_bad_images_are_mended_removed_or_allowed(
    counted: Counted, tmp_path: Path
) -> None:
    bad = [counted.source / "cat" / f"bad{i}.png" for i in range(6)]
    for path in bad:
        path.write_text("<html>404</html>")
    with pytest.raises(InputError, match="6 of 106 images"):
        counted()
    for path, data in zip(bad[:3], IMAGES[100:], strict=False):
        path.write_bytes(data)
    bad[3].unlink()
    with pytest.raises(InputError, match="2 of 105 images"):
        counted()
    manifest = counted(max_bad_fraction=0.03)
    assert manifest.quarantined == 2
    assert counted.decoded == [106, 5, 0]  # damaged images are tried again if their part has changed
    for path in bad[4:]:
        path.unlink()
    counted()
    mine = contents(counted.output)
    counted.output = tmp_path / "fresh"
    assert counted().quarantined == 0
    assert contents(counted.output) == mine


@pytest.mark.parametrize("place", ["in", "in/out", "in/cat/../out", "link/out"])
def test_an_output_inside_of_its_input_is_refused(tmp_path: Path, place: str) -> None:
    source = write_folder(tmp_path / "in", IMAGES[:10])
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(InputError, match="lies inside --input"):
        prepare(config(source, tmp_path / place))
    assert sorted(p.name for p in source.iterdir()) == sorted(CLASSES)


def test_what_was_found_is_said_in_one_line(counted: Counted, capsys: pytest.CaptureFixture[str]) -> None:
    (counted.source / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (counted.source / "cat" / "notes.txt").write_text("cats")
    (counted.source / "cat" / "empty.png").write_bytes(b"")
    counted(max_bad_fraction=0.5)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if " is folder" in line]
    counts = Counter(
        json.loads(line)["path"] for line in (counted.output / "ignored.jsonl").read_text().splitlines()
    )
    assert counts == {".DS_Store": 1, "cat/notes.txt": 1}
    assert line.startswith(f"prepare: {counted.source} is folder: 100 images (")
    assert "3 classes (cat, dog, owl)" in line
    assert "1 file ignored: hidden (.DS_Store)" in line
    assert "1 file ignored: not an image (cat/notes.txt)" in line
    assert "1 can't be used: empty (cat/empty.png)" in line


@pytest.mark.system
@pytest.mark.usefixtures("prepared_here")
def test_killed_and_started_again_it_finishes_what_is_missing(tmp_path: Path) -> None:
    images = [encode(picture(i, 700, 700), "JPEG") for i in range(20)] * 30
    source = write_folder(tmp_path / "in", images, "jpg")
    options = {"image_size": 32, "rows_per_shard": 20}
    flags = ("--source", "folder", "--input", source, "--image-size", 32, "--rows-per-shard", 20)
    output = tmp_path / "out"
    job = subprocess.Popen(
        command("prepare", *flags, "--output", output),
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while len(list(output.glob(RECORDS))) < 3:
            assert job.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    time.sleep(3)  # its Ray ends a moment later
    done = {p.name: p.stat().st_mtime_ns for p in output.glob(RECORDS)}
    assert 3 <= len(done) < 32
    assert not (output / "manifest.json").exists()
    outcome = run_job("prepare", *flags, "--output", output, home=tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert "prepare: 32/32 parts" in outcome.stderr
    assert done == {name: (output / "parts" / name).stat().st_mtime_ns for name in done}
    prepare(config(source, tmp_path / "reference", rows_per_group=0, **options))
    assert contents(output) == contents(tmp_path / "reference")


def test_little_data_needs_no_ray(prepared: tuple[Path, Manifest], source: Path, tmp_path: Path) -> None:
    """The job doesn't even import Ray, and its shards equal those of a pool of actors."""
    flags = ["--source", "folder", "--input", source, "--output", tmp_path / "out", "--image-size", 12]
    flags += ["--rows-per-shard", 60, "--rows-per-group", 16]
    program = (
        "import sys; from pipeline.commands import prepare\n"
        f"print(prepare.main({[str(flag) for flag in flags]}), 'ray' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "0 False"
    assert contents(tmp_path / "out") == contents(prepared[0])
