"""Finished files are kept, missing or damaged files are generated again, and no other file is read as samples."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.generation.ledger import ChunkRecord
from tests.generation.common import config, digests, make, manifest, opened, times


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished dataset, for damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_a_second_run_writes_nothing(model: Path, copy: Path) -> None:
    before = times(copy)
    assert make(config(copy), model)["metrics"]["generated"] == 0
    assert times(copy) == before


def test_files_cut_short_or_lost_are_made_again_and_only_they(model: Path, copy: Path, whole: Path) -> None:
    before = times(copy)
    cut, lost, *kept = sorted((copy / "data").iterdir())
    cut.write_bytes(cut.read_bytes()[:100])
    lost.unlink()
    assert make(config(copy), model)["metrics"] | {"images_per_second": 0} == {
        "generated": 16, "kept": 24, "blank": 0, "nonfinite": 0, "images_per_second": 0,
    }  # fmt: skip
    assert digests(copy) == digests(whole)
    assert manifest(copy) == manifest(whole)
    assert {name: times(copy)[name] for name in map(_name, kept)} == {
        name: before[name] for name in map(_name, kept)
    }


def _name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize(
    "name", ["settings.json", "manifest.json", "README.md", "contact-sheet.png", "notes"]
)
def test_any_file_cut_short_is_mended(name: str, model: Path, copy: Path, whole: Path) -> None:
    place = next((copy / name).iterdir()) if name == "notes" else copy / name
    place.write_bytes(place.read_bytes()[:7])
    made = make(config(copy), model)["metrics"]["generated"]
    assert made == (8 if name == "notes" else 0)
    assert digests(copy) == digests(whole)
    for file in ("settings.json", "manifest.json", "README.md", "contact-sheet.png"):
        assert (copy / file).read_bytes() == (whole / file).read_bytes()


def test_foreign_files_are_moved_aside_and_never_read_as_samples(
    model: Path, copy: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = copy / "data"
    (data / "more.parquet").write_bytes(b"mine")
    (data / "train-000000000040-000000000048.parquet").write_bytes(b"half a file of a driver that died")
    (data / "train-000000000000-000000000008.parquet.0123.partial").write_bytes(b"a write that was cut off")
    make(config(copy), model)
    assert digests(copy) == digests(whole)
    assert "2 files that do not belong to this dataset were moved to" in capfd.readouterr().err
    assert b"mine" in [path.read_bytes() for path in (copy / "foreign").iterdir()]
    assert len(opened(copy)) == 40


def test_foreign_images_among_png_folders_are_moved_aside(model: Path, tmp_path: Path) -> None:
    make(config(tmp_path, format="png"), model)
    before = digests(tmp_path)
    (tmp_path / "data" / "a" / "cat.png").write_bytes(b"mine")
    victim = next((tmp_path / "data" / "b").iterdir())
    victim.write_bytes(victim.read_bytes()[:10])
    assert make(config(tmp_path, format="png"), model)["metrics"]["generated"] == 8
    assert digests(tmp_path) == before


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my thesis")
    with pytest.raises(InputError, match=r"holds README\.md, which this job did not write"):
        make(config(tmp_path), model)
    assert (tmp_path / "README.md").read_text() == "my thesis"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_smaller_count_is_a_prefix_and_raising_it_only_adds(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    make(config(tmp_path, count=21), model)
    first = times(tmp_path)
    assert make(config(tmp_path), model)["metrics"]["kept"] == 21
    assert first.items() <= times(tmp_path).items()
    rows = [opened(path).sort("index") for path in (tmp_path, whole)]
    assert [row["image"].tobytes() for row in rows[0]] == [row["image"].tobytes() for row in rows[1]]
    assert list(rows[0]["label"]) == list(rows[1]["label"])


def test_files_that_overlap_are_sorted_out(model: Path, copy: Path, whole: Path, tmp_path: Path) -> None:
    """An actor can leave such files if it outlives a driver with a smaller count."""
    make(config(tmp_path / "fewer", count=21), model)
    name = "train-000000000016-000000000021.parquet"
    shutil.copy(tmp_path / "fewer" / "data" / name, copy / "data")
    shutil.copy(tmp_path / "fewer" / "notes" / f"{name}.json", copy / "notes")
    assert make(config(copy), model)["metrics"]["generated"] == 0
    assert digests(copy) == digests(whole)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed = 3, now it is 4"),
        ({"batch_size": 8}, "batch_size = 4, now it is 8"),
        ({"label_weights": (1.0, 1.0, 2.0)}, r"label_weights = \[\]"),
        ({"precision": "bf16"}, "precision = fp32, now it is bf16"),
        ({"format": "webdataset"}, "format = parquet, now it is webdataset"),
    ],
)
def test_another_setting_for_the_same_output_is_refused_by_name(
    changes: dict[str, object], named: str, model: Path, whole: Path
) -> None:
    before = digests(whole)
    with pytest.raises(InputError, match=named):
        make(config(whole, **changes), model)
    assert digests(whole) == before


def test_another_model_for_the_same_output_is_refused_with_the_name_of_the_first(
    unconditional: Path, whole: Path
) -> None:
    with pytest.raises(InputError, match=r"model_fingerprint = [0-9a-f]+ \(models:/m/1\)"):
        make(config(whole, guidance=1.0), unconditional)


def test_other_settings_are_refused_even_when_the_settings_file_is_lost(model: Path, copy: Path) -> None:
    (copy / "settings.json").unlink()
    with pytest.raises(InputError, match="made with other settings"):
        make(config(copy, seed=4), model)
    assert make(config(copy), model)["metrics"]["kept"] == 40


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"count": 0}, "--count"),
        ({"rows_per_file": 6}, "--rows-per-file"),
        ({"sampling_steps": 5}, "T = 4"),
        ({"labels": (3,)}, "--labels 3"),
        ({"label_weights": (1.0,)}, "1 weights for 3 classes"),
        ({"label_weights": (0.0, 0.0, 0.0)}, "their sum must be a finite number, and not 0"),
        (
            {"label_weights": (1.0, float("nan"), 1.0)},
            "--label-weights nan: must be a finite number, at least 0",
        ),
        ({"eta": 2.0}, "--eta"),
        ({"actors": 2, "max_actors": 3}, "--actors is a fixed number"),
        ({"min_actors": 3, "max_actors": 2}, "--max-actors 2 is less than"),
        ({"max_actors": -1}, "--max-actors -1: must be at least 0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    changes: dict[str, object], named: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=named):
        make(config(tmp_path, **changes), model)
    assert not list(tmp_path.iterdir())


def test_every_note_says_what_its_file_holds(whole: Path) -> None:
    notes = [ChunkRecord(**json.loads(path.read_text())) for path in sorted((whole / "notes").iterdir())]
    assert [note.rows for note in notes] == [8] * 5
    assert [note.sha256 for note in notes] == list(digests(whole).values())
