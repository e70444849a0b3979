"""Training on each kind of raw data: workers read what the index promises."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from pipeline.config import ModelConfig, Source
from pipeline.data.index import open_splits
from pipeline.errors import InputError
from pipeline.training import checkpoint
from pipeline.training.trainer import train
from tests.data.common import encoded, write_idx, write_parquet, write_tars
from tests.data.test_accounting import write_splits, write_zip
from tests.training.digit_runs import settings
from tests.training.runs import train_here
from tests.training.test_loop import epochs_digest

IMAGES = encoded(40, 8, 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(40) % 4


def idx(folder: Path) -> None:
    write_idx(folder / "mnist", PIXELS[..., 0], LABELS)


def npz(folder: Path) -> None:
    np.savez(folder / "train.npz", arr_0=PIXELS, arr_1=LABELS)


def cifar(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3072), dtype=np.uint8)
    for name, some in (("data_batch_1.bin", slice(0, 30)), ("test_batch.bin", slice(30, 40))):
        np.concatenate([LABELS[some, None].astype(np.uint8), pixels[some]], axis=1).tofile(folder / name)


def arrow(folder: Path) -> None:
    images = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(IMAGES)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])}
    )
    table = datasets.Dataset.from_dict({"image": images, "label": LABELS.tolist()}, features=features)
    table.save_to_disk(str(folder / "saved"))


WRITERS: dict[Source, Callable[[Path], object]] = {
    "folder": lambda folder: write_splits(folder, IMAGES),
    "zip": lambda folder: write_zip(folder / "zips", IMAGES),
    "webdataset": lambda folder: write_tars(folder / "tars", IMAGES),
    "huggingface": lambda folder: write_parquet(folder, IMAGES),
    "arrow": arrow,
    "npz": npz,
    "cifar": cifar,
    "idx": idx,
}


SMALL = ModelConfig(32, (1,), res_blocks=1, attention_resolutions=(), class_conditional=True)


@pytest.mark.parametrize("source", WRITERS)
def test_training_sees_each_image_of_a_raw_source_once_an_epoch(
    source: Source, home: Path, tmp_path: Path
) -> None:
    """The test below shows the same in a whole run."""
    data = tmp_path / "data"
    data.mkdir()
    WRITERS[source](data)
    splits = open_splits(str(data))
    rows = splits["train"].rows
    assert sum(index.rows for index in splits.indexes.values()) == (35 if source == "folder" else 40)
    config = settings(home, str(tmp_path / "run"), steps=2, batch_size=rows)
    seen = train_here(replace(config, data=str(data), model=SMALL))
    assert seen == {"samples": 2 * rows, "digest": epochs_digest(2, rows), "undecodable": 0}


def test_data_that_was_cut_otherwise_is_refused_with_what_puts_it_right(home: Path, tmp_path: Path) -> None:
    """The images and so the fingerprint are the same, but their order differs."""
    data = write_tars(tmp_path / "data", IMAGES, per_tar=10)
    rows = open_splits(str(data))["train"].rows
    config = settings(home, str(tmp_path / "run"), steps=2, batch_size=rows, checkpoint_every=2)
    config = replace(config, data=str(data), model=SMALL)
    train(config)
    saved, state = checkpoint.read(checkpoint.complete(str(tmp_path / "run" / "checkpoints"))[0])
    assert saved.step == 2
    assert state["seen"] == {"samples": 2 * rows, "digest": epochs_digest(2, rows), "undecodable": 0}
    shutil.rmtree(data)
    write_tars(data, IMAGES, per_tar=8)
    with pytest.raises(
        InputError, match=r"--data \S+: its files, or their row groups, differ from .*restore them"
    ):
        train(replace(config, steps=4, resume=True))
