"""Dataset cards, for people and for Hugging Face's `datasets`, which caches datasets under the card's hash."""

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from pipeline.data.shards import PrepareConfig, prepare
from pipeline.errors import InputError
from pipeline.generation import job
from pipeline.markdown import plain, table
from pipeline.models.export import load_model, save_model
from tests.generation.common import config, digests, make, manifest


def front_matter(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text()
    content: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return content


def rows(folder: Path, cache: Path, **options: Any) -> list[tuple[Any, Any, bytes]]:
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(cache), **options)
    return sorted((row["index"], row["seed"], row["image"].tobytes()) for row in loaded)


@pytest.mark.parametrize("form", ["parquet", "png"])
@pytest.mark.parametrize("streaming", [False, True])
def test_two_sets_and_one_that_has_grown_are_not_taken_for_each_other(
    form: str, streaming: bool, model: Path, tmp_path: Path
) -> None:
    """All sets have the same folder name, like `/data/set` on two machines, and share one cache."""
    cache, place = tmp_path / "cache", tmp_path / "set"
    found = list[list[tuple[Any, Any, bytes]]]()
    for seed, count in ((3, 16), (3, 24), (4, 16)):
        if seed == 4:
            place.rename(tmp_path / "other")
        make(config(place, seed=seed, count=count, format=form), model)
        found.append(rows(place, cache, streaming=streaming))
        assert len(found[-1]) == count
    first, grown, other = found
    assert grown[:16] == first
    assert {row[1] for row in other} == {4}
    assert [row[2] for row in other] != [row[2] for row in first]


def test_the_card_has_features_sizes_and_the_fingerprint(model: Path, tmp_path: Path) -> None:
    make(config(tmp_path, count=16), model)
    info = front_matter(tmp_path)["dataset_info"]
    length = sum(file.stat().st_size for file in (tmp_path / "data").iterdir())
    assert info["splits"] == [{"name": "train", "num_bytes": length, "num_examples": 16}]
    assert (info["download_size"], info["dataset_size"]) == (length, length)
    assert manifest(tmp_path)["sha256"] in info["description"]
    loaded = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["label"].names == ["a", "b", "c"]
    assert [feature["name"] for feature in info["features"]] == list(loaded.features)


def test_a_set_that_grows_has_no_sizes_until_it_is_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(config(tmp_path, count=16), model)
    with monkeypatch.context() as killed:
        killed.setattr(job, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(config(tmp_path, count=24), model)
    info = front_matter(tmp_path)["dataset_info"]
    assert "splits" not in info
    assert manifest(tmp_path)["sha256"] not in info["description"]
    assert len(rows(tmp_path, tmp_path / "cache")) == 24
    make(config(tmp_path, count=24), model)
    assert front_matter(tmp_path)["dataset_info"]["splits"][0]["num_examples"] == 24


def test_a_prepared_sets_card_has_them_too(tmp_path: Path, cluster: None) -> None:
    prepare(PrepareConfig(output=str(tmp_path / "digits"), source="digits"))
    info = front_matter(tmp_path / "digits")["dataset_info"]
    loaded = datasets.load_dataset(str(tmp_path / "digits"), cache_dir=str(tmp_path / "cache"))
    assert {one["name"]: one["num_examples"] for one in info["splits"]} == loaded.num_rows
    assert [feature["name"] for feature in info["features"]] == list(loaded["train"].features)
    assert loaded["train"].features["label"].names == list("0123456789")


def test_the_card_says_what_generation_did_and_not_what_training_did(model: Path, tmp_path: Path) -> None:
    network, spec = load_model(model)
    told = {"batch_size": 999, "seed": 888, "notes": "a | b\n# <script>"}
    other = save_model(tmp_path / "model", network.state_dict(), dataclasses.replace(spec, provenance=told))
    make(config(tmp_path / "set", count=8, labels=("c", "0")), other)
    generation, training = (
        (tmp_path / "set" / "README.md").read_text().split("| generation | |")[1].split("| the model")
    )
    assert "| batch\\_size | 4 |" in generation
    assert "| seed | 3 |" in generation
    assert "| labels | 2 (c), 0 (a) |" in generation
    assert "| batch\\_size | 999 |" in training
    assert "| notes | a \\| b \\# \\<script\\> |" in training


def test_classes_are_sampled_by_name_or_number(model: Path, tmp_path: Path) -> None:
    make(config(tmp_path / "named", count=16, labels=("c", "a")), model)
    make(config(tmp_path / "numbered", count=16, labels=("2", "0")), model)
    assert digests(tmp_path / "named") == digests(tmp_path / "numbered")
    for unknown in ("d", "3", "-1"):
        with pytest.raises(InputError, match=f"--labels {unknown}: the model has classes 0 to 2: a, b, c"):
            make(config(tmp_path / "unknown", labels=(unknown,)), model)


@pytest.mark.parametrize("form", ["parquet", "png", "webdataset"])
@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, -5])
def test_any_seed_of_64_bits_is_written(form: str, seed: int, model: Path, tmp_path: Path) -> None:
    make(config(tmp_path, count=8, format=form, seed=seed), model)
    if form == "webdataset":
        assert f'"seed": {seed}' in (tmp_path / "data").glob("*.tar").__next__().read_bytes().decode(
            "latin-1"
        )
    else:
        assert {row[1] for row in rows(tmp_path, tmp_path / "cache")} == {seed if seed < 2**63 else str(seed)}


def test_text_in_a_table_is_nothing_else() -> None:
    assert plain("a\nb  [x](y) `c` | *d* <e>") == r"a b \[x\](y) \`c\` \| \*d\* \<e\>"
    assert table("key", {"a": 1}) == "| key | |\n| --- | --- |\n| a | 1 |\n"


@pytest.mark.parametrize("where", ["other class", "no class"])
def test_a_copy_of_an_image_elsewhere_is_moved_aside(where: str, model: Path, tmp_path: Path) -> None:
    settings = config(tmp_path, count=16, format="png")
    make(settings, model)
    before = digests(tmp_path)
    image = next((tmp_path / "data" / "a").iterdir())
    place = tmp_path / "data" / ("b" if where == "other class" else "") / image.name
    place.write_bytes(image.read_bytes())
    assert make(settings, model)["metrics"]["generated"] == 0
    assert digests(tmp_path) == before
    # The image is moved, not copied, so it is missing from its class.
    image.rename(place)
    assert make(settings, model)["metrics"]["generated"] == 8
    assert digests(tmp_path) == before


def test_more_single_files_than_file_systems_like_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"more than 1,000,000 single files.*--format parquet or webdataset"):
        make(config(tmp_path / "set", count=1_000_001, format="png"), model)
    assert not (tmp_path / "set").exists()
