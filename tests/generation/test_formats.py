"""Every format opens unchanged in the libraries that read it, and every row has its label, index and seed."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline.config import ImageConfig
from pipeline.data.groups import read_rows
from pipeline.data.images import decode
from pipeline.data.index import open_dataset
from pipeline.generation.writers import Row, class_folders, parquet
from tests.generation.common import config, digests, make, manifest, opened


@pytest.fixture(scope="module")
def pixels(whole: Path) -> list[bytes]:
    """The pixels of the samples in order, from the Parquet files."""
    rows = opened(whole).sort("index")
    return [row["image"].tobytes() for row in rows]


def test_huggingface_datasets_opens_parquet(whole: Path) -> None:
    data = opened(whole)
    assert data.column_names == ["image", "label", "index", "seed"]
    assert list(data["index"]) == list(range(40))
    assert set(data["seed"]) == {3}
    assert data[0]["image"].size == (8, 8)
    assert data.features["label"].names == ["a", "b", "c"]
    assert len(set(data["label"])) == 3


def test_huggingface_datasets_opens_png_folders(model: Path, tmp_path: Path, pixels: list[bytes]) -> None:
    make(config(tmp_path, format="png"), model)
    data = opened(tmp_path).sort("index")
    assert set(data.column_names) == {"image", "label", "index", "seed"}
    assert data.features["label"].names == ["a", "b", "c"]
    assert [row["image"].tobytes() for row in data] == pixels
    for row in data:
        assert (tmp_path / "data" / "abc"[row["label"]] / f"{row['index']:012d}.png").exists()


def test_webdataset_and_huggingface_datasets_open_tars(
    model: Path, tmp_path: Path, pixels: list[bytes]
) -> None:
    for name in ("one", "two"):
        make(config(tmp_path / name, format="webdataset"), model)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    tars = [str(path) for path in sorted((tmp_path / "one" / "data").iterdir())]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("pil"))
    assert [sample["json"]["index"] for sample in samples] == list(range(40))
    assert [sample["png"].convert("L").tobytes() for sample in samples] == pixels
    assert all(s["json"] == {"index": i, "label": s["cls"], "seed": 3} for i, s in enumerate(samples))
    data = opened(tmp_path / "one")
    assert [row["png"].tobytes() for row in data] == pixels
    assert [row["json"]["index"] for row in data] == list(range(40))


def test_samples_of_an_unconditional_model_have_no_label(unconditional: Path, tmp_path: Path) -> None:
    make(config(tmp_path / "a", guidance=1.0, count=8), unconditional)
    assert list(opened(tmp_path / "a")["label"]) == [None] * 8
    make(config(tmp_path / "b", guidance=1.0, count=8, format="png"), unconditional)
    assert list(opened(tmp_path / "b")["label"]) == [None] * 8


@pytest.mark.parametrize("form", ["parquet", "png", "webdataset", "npz"])
def test_samples_can_be_trained_on(
    model: Path, tmp_path: Path, whole: Path, pixels: list[bytes], form: str
) -> None:
    make(config(tmp_path, format=form), model)
    splits = [open_dataset(str(tmp_path), split) for split in ("train", "validation")]
    assert splits[0].image == ImageConfig(
        8, 1, ("0", "1", "2") if form in ("webdataset", "npz") else ("a", "b", "c")
    )
    found = Counter[bytes]()
    for split in splits:
        for group in split.groups:
            rows = read_rows(group, np.arange(group.rows)).to_pylist()
            found.update(b"%d" % row["label"] + decode(row["bytes"], 8, 1).tobytes() for row in rows)
    labels = opened(whole).sort("index")["label"]
    assert found == Counter(b"%d" % label + data for label, data in zip(labels, pixels, strict=True))


def test_the_manifest_says_where_the_samples_came_from(whole: Path) -> None:
    about = manifest(whole)
    assert about["model"] == "models:/m/1"
    assert len(about["settings"]["model_fingerprint"]) == 64
    assert about["settings"]["seed"] == 3
    assert about["settings"]["sampler"] == "ancestral"
    assert about["trained_on"]["data_fingerprint"] == "f1f2"
    assert about["code"]["ray-ddpm"]
    assert (about["count"], about["blank"], about["nonfinite"]) == (40, 0, 0)
    assert {entry["file"]: entry["sha256"] for entry in about["files"]} == digests(whole)


def test_the_card_shows_the_first_samples(whole: Path, pixels: list[bytes]) -> None:
    assert "![The first of them](contact-sheet.png)" in (whole / "README.md").read_text()
    sheet = Image.open(whole / "contact-sheet.png")
    assert sheet.size == (16 * 8, 3 * 8)
    assert sheet.crop((8, 16, 16, 24)).tobytes() == pixels[33]


@pytest.mark.parametrize("classes", [(), ("a", "b")])
def test_parquet_files_are_those_of_0_1_0_byte_for_byte(classes: tuple[str, ...]) -> None:
    """Datasets of 0.1.0 are continued by comparing digests, so its way of writing must stay."""
    labels = [i % 2 for i in range(5)] if classes else [None] * 5
    integer = {"dtype": "int64", "_type": "Value"}
    label = {"names": list(classes), "_type": "ClassLabel"} if classes else integer
    features = {"image": {"_type": "Image"}, "label": label, "index": integer, "seed": integer}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": image, "label": pa.int64(), "index": pa.int64(), "seed": pa.int64()}
    schema = pa.schema(columns, {"huggingface": json.dumps({"info": {"features": features}})})
    fields = [pa.array([b"png%d" % i for i in range(5)]), pa.array([f"{i:012d}.png" for i in range(5)])]
    arrays = [pa.StructArray.from_arrays(fields, fields=list(image))]
    arrays += [pa.array(values, pa.int64()) for values in (labels, range(5), [7] * 5)]
    buffer = io.BytesIO()
    table = pa.Table.from_arrays(arrays, schema=schema)
    pq.write_table(table, buffer, compression="none", write_statistics=False)
    rows = [Row(b"png%d" % i, labels[i], i, 7) for i in range(5)]
    assert parquet(rows, classes) == buffer.getvalue()


def test_class_names_that_are_no_folder_names_get_safe_ones() -> None:
    assert class_folders(("cat", "big dog")) == ["cat", "big dog"]
    folders = class_folders(("../../etc", "a/b", "a_b", "..", ""))
    assert len(set(folders)) == 5
    assert not any("/" in folder or folder.startswith(".") or not folder for folder in folders)
