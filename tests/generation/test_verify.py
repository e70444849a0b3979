"""`--verify` finds damage that leaves lengths unchanged, and samples that regenerate differently."""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.generation.chunks import Chunk
from pipeline.generation.config import GenerateConfig
from pipeline.generation.job import model_to_use
from pipeline.generation.sampler import Renderer, Setup, uris_of
from pipeline.models.export import pack_model
from tests.generation.common import config, digests, make


@pytest.fixture(params=["parquet", "png"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def dataset(form: str, model: Path, tmp_path: Path) -> Path:
    make(config(tmp_path / "set", format=form, count=20), model)
    return tmp_path / "set"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def checked(folder: Path, model: Path, **changes: Any) -> dict[str, float]:
    """Run --verify with nothing but the folder, and return its metrics."""
    asked = GenerateConfig(output=str(folder), verify=True, **changes)
    assert model_to_use(asked) == "m"
    metrics: dict[str, float] = make(asked, model)["metrics"]
    return metrics


def test_a_sound_dataset_is_verified_without_a_flag_and_nothing_is_written(
    model: Path, dataset: Path, form: str
) -> None:
    before = everything(dataset)
    for folder in [dataset, *(path for path in dataset.rglob("*") if path.is_dir())]:
        folder.chmod(0o555)
    try:
        metrics = checked(dataset, model, verify_share=1.0)
    finally:
        for folder in [dataset, *(path for path in dataset.rglob("*") if path.is_dir())]:
            folder.chmod(0o755)
    assert (metrics["verified"], metrics["regenerated"]) == (3, 3)
    assert everything(dataset) == before


def test_settings_that_are_no_settings_of_samples_get_one_line(model: Path, dataset: Path) -> None:
    settings = dataset / "settings.json"
    content = json.loads(settings.read_text())
    for key in ("labels", "label_weights", "device"):
        fixed = {name: value for name, value in content["fixed"].items() if name != key}
        settings.write_text(json.dumps(content | {"fixed": fixed}))
        with pytest.raises(InputError, match=r"settings\.json is damaged: restore it"):
            checked(dataset, model)


def test_flags_that_say_otherwise_than_the_dataset_are_refused(model: Path, dataset: Path) -> None:
    for changes, flag in (
        ({"seed": 9}, "--seed 3, not 9"),
        ({"count": 21}, "--count 20, not 21"),
        ({"labels": ("a", "1")}, "--labels (), not a b"),
        ({"sampling_steps": 7}, "--sampling-steps 4, not 7"),
    ):
        with pytest.raises(InputError, match=f"made with {re.escape(flag)}: leave the flag out"):
            checked(dataset, model, **changes)
    checked(dataset, model, seed=3, count=20, guidance=1.5, sampling_steps=4)


def test_classes_may_be_given_by_name_or_number(model: Path, tmp_path: Path) -> None:
    make(config(tmp_path / "set", count=8, labels=("a", "2")), model)
    for labels in ((), ("a", "c"), ("0", "c")):
        checked(tmp_path / "set", model, labels=labels)
    with pytest.raises(InputError, match="made with --labels a c, not c a: leave the flag out"):
        checked(tmp_path / "set", model, labels=("c", "a"))


def test_a_folder_that_was_mistyped_is_neither_made_nor_claimed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(InputError, match=r"has no manifest\.json"):
            make(GenerateConfig(model="m", output=str(tmp_path / name), verify=True), model)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not list((tmp_path / "empty").iterdir())
    with pytest.raises(InputError, match="--model is missing"):
        model_to_use(GenerateConfig(output=str(tmp_path / "nowhere"), verify=True))
    with pytest.raises(InputError, match="--output is missing"):
        model_to_use(GenerateConfig(model="m"))


def test_a_flipped_bit_is_found_and_the_next_run_mends_it(model: Path, dataset: Path, form: str) -> None:
    before = digests(dataset)
    victim = sorted(path for path in (dataset / "data").rglob("0*.png" if form == "png" else "*.parquet"))[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    changed = everything(dataset)
    with pytest.raises(InputError, match=r": train-\S+ is damaged\. Remove the damaged files"):
        checked(dataset, model)
    assert everything(dataset) == changed
    victim.unlink()
    with pytest.raises(InputError, match=r"train-\S+ is lost, cut short"):
        checked(dataset, model)
    assert make(config(dataset, format=form, count=20), model)["metrics"]["generated"] in (4, 8)
    assert digests(dataset) == before
    checked(dataset, model)


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "png", "npz"])
def test_every_change_is_found_or_harmless_to_readers(kind: str, model: Path, tmp_path: Path) -> None:
    """Each file in turn is changed, truncated, emptied, removed, copied beside itself, and swapped with a similar one."""
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    make(config(whole, format=kind, count=12), model)
    harmless = {"arithmetic.json", "contact-sheet.png", "lock.json", ".lock"}
    files = [name for name in everything(whole) if name not in harmless]
    assert {"manifest.json", "README.md", "settings.json"} < set(files)
    data = [name for name in files if name.startswith("data/")]
    chance, missed = random.Random(0), list[tuple[str, str]]()

    def changes(name: str) -> Iterator[tuple[str, Callable[[], object]]]:
        file = copy / name
        content = file.read_bytes()
        at = chance.randrange(len(content))
        yield (
            "changed",
            lambda: file.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :]),
        )
        yield "cut", lambda: file.write_bytes(content[:-7])
        yield "removed", file.unlink
        if name in data:
            other = copy / chance.choice([one for one in data if one != name])
            yield "swapped", lambda: (file.rename(copy / "x"), other.rename(file), (copy / "x").rename(other))
            yield "copied", lambda: shutil.copy(file, file.with_name(f"train-9{file.suffix}"))

    # Of single images, a few are enough.
    for name in [*(one for one in files if one not in data), *data[:: 5 if kind == "png" else 1]]:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        for how, change in changes(name):
            change()
            try:
                checked(copy, model)
                missed.append((name, how))
            except InputError:
                pass
            shutil.rmtree(copy)
            shutil.copytree(whole, copy)
    # The only changes missed are in values of a manifest or record that nothing reads.
    assert all(how == "changed" and not name.startswith("data/") for name, how in missed), missed
    assert len(missed) < 3


def test_a_false_checksum_of_the_manifest_is_said(model: Path, dataset: Path) -> None:
    place = dataset / "manifest.json"
    manifest = json.loads(place.read_text())
    manifest["files"][1]["sha256"] = "0" * 64
    manifest["blank"] = 7
    place.write_text(json.dumps(manifest))
    name = r"train-000000000008-000000000016\.\w+"
    with pytest.raises(InputError, match=rf"{name} in manifest\.json does not match its record") as error:
        checked(dataset, model)
    assert "manifest.json says blank = 7, but its files have 0" in str(error.value)


def test_damage_that_an_ordinary_run_comes_across_is_sent_to_verify(
    model: Path, dataset: Path, form: str
) -> None:
    before = digests(dataset)
    victim = dataset / "data" / sorted(before, key=lambda name: name.rpartition("/")[2])[0]
    victim.write_bytes(b"x" * victim.stat().st_size)
    with pytest.raises(InputError, match="run with --verify to list"):
        make(config(dataset, format=form, count=20), model)
    with pytest.raises(InputError, match="is damaged"):
        checked(dataset, model)
    victim.unlink()
    make(config(dataset, format=form, count=20), model)
    assert digests(dataset) == before


def test_samples_that_do_not_come_out_again_are_named(model: Path, whole: Path, tmp_path: Path) -> None:
    """The file's checksum is right, but its samples belong to another seed."""
    other = Path(shutil.copytree(whole, tmp_path / "copy"))
    forged = Renderer(Setup(pack_model(model), config(other, seed=4), str(other), ""))
    chunk = Chunk(8, 16)
    data = forged.contents(chunk, forged.render(chunk))[0]
    (place,) = map(Path, uris_of(forged.config, forged.spec, str(other), chunk))
    true, size = digests(other)[place.name], place.stat().st_size
    place.write_bytes(data)
    for file in (other / "notes" / f"{place.name}.json", other / "manifest.json"):
        content = file.read_text().replace(true, digests(other)[place.name])
        file.write_text(content.replace(f'"bytes": {size}', f'"bytes": {len(data)}'))
    with pytest.raises(InputError, match=f"{place.name} is intact, but regenerating it gave different bytes"):
        checked(other, model, verify_share=1.0)


def test_an_unfinished_dataset_is_not_verified(model: Path, whole: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(whole, tmp_path / "copy"))
    (other / "manifest.json").unlink()
    with pytest.raises(InputError, match="has not finished a dataset"):
        checked(other, model)
