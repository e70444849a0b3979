"""`--verify` finds what no length shows, and what does not come out the same again."""

import shutil
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.generation.chunks import Chunk
from pipeline.generation.sampler import Renderer, Setup
from pipeline.models.export import pack_model
from tests.generation.common import config, digests, make, times


@pytest.fixture(params=["parquet", "png"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def dataset(form: str, model: Path, tmp_path: Path) -> Path:
    make(config(tmp_path / "set", format=form, count=20), model)
    return tmp_path / "set"


def test_a_sound_dataset_is_verified_and_left_as_it_is(model: Path, dataset: Path, form: str) -> None:
    before = times(dataset)
    settings = config(dataset, format=form, count=20, verify=True, verify_share=1.0)
    metrics = make(settings, model)["metrics"]
    assert (metrics["verified"], metrics["regenerated"]) == (3, 3)
    assert times(dataset) == before


def test_a_flipped_bit_is_found_and_the_next_run_mends_it(model: Path, dataset: Path, form: str) -> None:
    before = digests(dataset)
    victim = sorted(path for path in (dataset / "data").rglob("0*.png" if form == "png" else "*.parquet"))[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    settings = {"format": form, "count": 20}
    with pytest.raises(InputError, match=r"of 3 files 1 damaged: train-"):
        make(config(dataset, verify=True, **settings), model)
    assert make(config(dataset, **settings), model)["metrics"]["generated"] in (4, 8)
    assert digests(dataset) == before


def test_damage_that_an_ordinary_run_comes_across_is_sent_to_verify(
    model: Path, dataset: Path, form: str
) -> None:
    before = digests(dataset)
    victim = dataset / "data" / sorted(before, key=lambda name: name.rpartition("/")[2])[0]
    victim.write_bytes(b"x" * victim.stat().st_size)
    settings = {"format": form, "count": 20}
    with pytest.raises(InputError, match="with --verify, then as before"):
        make(config(dataset, **settings), model)
    with pytest.raises(InputError, match="1 damaged"):
        make(config(dataset, verify=True, **settings), model)
    make(config(dataset, **settings), model)
    assert digests(dataset) == before


def test_samples_that_do_not_come_out_again_are_named(model: Path, whole: Path, tmp_path: Path) -> None:
    """A file that is sound by its checksum, and holds other samples than its settings say."""
    other = Path(shutil.copytree(whole, tmp_path / "copy"))
    forged = Renderer(Setup(pack_model(model), config(other, seed=4), str(other), ""))
    chunk = Chunk(8, 16)
    data = forged.contents(chunk, forged.render(chunk))[0]
    place = Path(forged.places(str(other), chunk)[0])
    note = other / "notes" / f"{place.name}.json"
    true = digests(other)[place.name]
    size = place.stat().st_size
    place.write_bytes(data)
    content = note.read_text().replace(true, digests(other)[place.name])
    note.write_text(content.replace(f'"bytes": {size}', f'"bytes": {len(data)}'))
    with pytest.raises(InputError, match=f"1 intact, but regenerating it gave different bytes: {place.name}"):
        make(config(other, verify=True, verify_share=1.0), model)


def test_an_incomplete_dataset_is_not_verified(model: Path, whole: Path) -> None:
    with pytest.raises(InputError, match="samples 40 to 49 are missing"):
        make(config(whole, count=50, verify=True), model)
