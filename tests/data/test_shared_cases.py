"""Inputs as users have them (../shared/cases/make.py writes them), both prepared and read raw."""

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow.compute as pc
import pytest

from pipeline.cluster.pool import in_process
from pipeline.config import Reading
from pipeline.data import shards
from pipeline.data.groups import read_rows
from pipeline.data.index import Splits, open_splits
from pipeline.data.shards import PrepareConfig, prepare
from tests.data.reading import listed
from tests.jobs.common import ROOT

MAKE = ROOT.parent / "shared" / "cases" / "make.py"
pytestmark = pytest.mark.skipif(not MAKE.exists(), reason=f"{MAKE} is not there")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ActorPool", lambda *_, **__: in_process)


def make(name: str, folder: Path, *numbers: int) -> Path:
    subprocess.run([sys.executable, MAKE, name, str(folder), *map(str, numbers)], check=True)
    return folder


@dataclass(frozen=True)
class Found:
    """The number of images in each split, the classes, and the number of images with each label."""

    splits: dict[str, int]
    classes: tuple[str, ...]
    labels: Counter[int]


def found(splits: Splits) -> Found:
    labels = Counter[int]()
    for index in splits.indexes.values():
        for group in index.groups:
            table = read_rows(group, np.arange(group.rows))
            assert pc.min(pc.binary_length(table["bytes"])).as_py() and not table["bytes"].null_count
            labels.update(table["label"].to_pylist())
    (classes,) = {index.image.classes for index in splits.indexes.values()}
    return Found({name: index.rows for name, index in splits.indexes.items()}, classes, labels)


def both_ways(folder: Path, output: Path, **settings: object) -> Found:
    """Open a folder both prepared and raw, and check that both agree."""
    prepare(PrepareConfig(str(output), input=str(folder), image_size=16, **settings))  # type: ignore[arg-type]
    prepared, raw = found(open_splits(str(output))), found(open_splits(str(folder), 16))
    assert prepared == raw
    return prepared


def test_mac_zip(tmp_path: Path) -> None:
    there = both_ways(make("mac_zip", tmp_path / "in"), tmp_path / "out")
    assert (sum(there.splits.values()), there.classes) == (60, ("cats", "dogs"))
    assert there.labels == {0: 30, 1: 30}
    assert list(listed(tmp_path / "out", "ignored.jsonl").values()) == ["hidden"] * 62


def test_img2dataset(tmp_path: Path) -> None:
    there = both_ways(make("img2dataset", tmp_path / "in"), tmp_path / "out")
    assert (sum(there.splits.values()), there.classes, there.labels) == (60, (), {-1: 60})
    assert set(listed(tmp_path / "out", "ignored.jsonl")) == {
        "00000.parquet", "00001.parquet", "00000_stats.json", "00001_stats.json"
    }  # fmt: skip


def test_hub_cifar(tmp_path: Path) -> None:
    there = both_ways(make("hub_cifar", tmp_path / "in"), tmp_path / "out")
    assert (sum(there.splits.values()), there.classes, there.labels) == (40, ("cat", "dog"), {0: 20, 1: 20})


def test_hub_splits(tmp_path: Path) -> None:
    folder = make("hub_splits", tmp_path / "in")
    there = both_ways(folder, tmp_path / "out")
    assert there.splits == {"train": 60, "validation": 15}
    assert there.labels == {0: 25, 1: 25, 2: 25}
    assert sum(found(open_splits(str(folder), 16, split=("test",))).splits.values()) == 15
    everything = found(open_splits(str(folder), 16, split=("all",)))
    assert everything.splits == {"train": 60, "validation": 15, "test": 15} and everything.labels[-1] == 15


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "dictionary", "bool", "uint8", "float"]
)
def test_label_types(kind: str, tmp_path: Path) -> None:
    folder = make("label_types", tmp_path / "in") / kind
    there = both_ways(folder, tmp_path / "out")
    assert sum(there.splits.values()) == 40 and there.labels == {0: 20, 1: 20}
    texts = kind in ("string", "large_string", "string_view", "dictionary")
    assert there.classes == (("cat", "dog") if texts else ("0", "1"))


def test_dotted_keys(tmp_path: Path) -> None:
    there = both_ways(make("dotted_keys", tmp_path / "in"), tmp_path / "out")
    assert sum(there.splits.values()) == 90 and there.labels == {0: 30, 1: 30, -1: 30}


def test_linked_class(tmp_path: Path) -> None:
    there = both_ways(make("linked_class", tmp_path / "in") / "data", tmp_path / "out")
    assert (there.classes, there.labels) == (("birds", "fish"), {0: 30, 1: 30})


def test_growing(tmp_path: Path) -> None:
    folder = make("growing", tmp_path / "in")
    assert sum(both_ways(folder, tmp_path / "out").splits.values()) == 100
    make("growing", folder, 100, 60)
    assert sum(both_ways(folder, tmp_path / "out").splits.values()) == 160


def test_mendable(tmp_path: Path) -> None:
    folder = make("mendable", tmp_path / "in")
    with pytest.raises(Exception, match="5 of 45 images"):
        both_ways(folder, tmp_path / "out")
    for path in folder.glob("bad*.png"):
        path.unlink()
    assert sum(both_ways(folder, tmp_path / "out").splits.values()) == 40


def test_columns_can_be_named(tmp_path: Path) -> None:
    folder = make("hub_cifar", tmp_path / "in")
    reading = Reading(image_column="img", label_column="none")
    assert found(open_splits(str(folder), 16, reading)).labels == {-1: 40}


@pytest.mark.soak  # writes two gigabytes; test_parquet_reader.py reads small groups in the same way
@pytest.mark.skipif(psutil.virtual_memory().available < 8 * 2**30, reason="needs 8 GiB of memory")
def test_big_row_group(tmp_path: Path) -> None:
    folder = make("big_row_group", tmp_path / "in")
    assert sum(both_ways(folder, tmp_path / "out").splits.values()) == 2100
