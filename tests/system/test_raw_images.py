"""Training on images that weren't prepared."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.commands import cli
from pipeline.config import TrainConfig
from pipeline.errors import InputError
from tests.data.common import encoded, write_folder
from tests.jobs.common import Outcome
from tests.training.runs import train_here

SMALL = ("--model-channels", 32, "--channel-multipliers", 1, "--attention-resolutions", 4, "--timesteps", 20)


def test_training_reads_a_folder_as_it_is(tmp_path: Path, job: Callable[..., Outcome]) -> None:
    """Images have any shape. Broken ones are counted and named."""
    folder = write_folder(tmp_path / "in", encoded(300, 20, 12))
    broken = [folder / "cat" / f"bad-{i}.png" for i in range(12)]
    for i, path in enumerate(broken):
        path.write_bytes(b"\x89PNG nothing %d" % i)
    flags = (
        "--data",
        folder,
        "--image-size",
        8,
        "--random-crop",
        "--random-flip",
        "--batch-size",
        16,
        *SMALL,
    )
    run = ("--output", tmp_path / "run", "--steps", 20, "--log-every", 20, "--max-bad-fraction", 0.1)
    done = job("train", *flags, *run, home=tmp_path)
    assert done.code == 0, done.stderr
    named = (tmp_path / "run" / "quarantine.jsonl").read_text()
    assert done.result["metrics"]["undecodable_images"] >= named.count("bad-") > 0
    assert "UnidentifiedImageError" in named
    assert "can't be decoded" in done.stderr
    words = (*flags, "--output", tmp_path / "over", "--steps", 20, "--max-bad-fraction", 0.001)
    with pytest.raises(InputError, match="--max-bad-fraction"):
        train_here(cli.parse(TrainConfig, list(map(str, words)), "train", ""))
