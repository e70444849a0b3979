"""`--help`, and the error for a mistake in a settings file."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster.submit import SubmitConfig
from pipeline.commands import cli
from pipeline.commands.__main__ import JOBS, main
from pipeline.commands.demo import DemoConfig
from pipeline.commands.export import ExportConfig
from pipeline.commands.plot import PlotConfig
from pipeline.config import TrainConfig
from pipeline.data.shards import PrepareConfig
from pipeline.errors import InputError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.generation.config import GenerateConfig
from pipeline.tuning.config import TuneConfig

CONFIGS = (
    PrepareConfig, TrainConfig,
    TuneConfig, GenerateConfig, EvaluateConfig, PlotConfig, ExportConfig, SubmitConfig, DemoConfig,
)  # fmt: skip


def helped(job: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([job, "--help"])
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_an_example_that_parses(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    paragraphs = helped(job, capsys).split("\n\n")
    (example,) = (p for p in paragraphs if p.startswith("Example: "))
    program, name, *words = example.removeprefix("Example: ").split()
    assert (program, name) == ("ray-ddpm", job)
    config = {cls.__name__.removesuffix("Config").lower(): cls for cls in CONFIGS}[job]
    own, flags = cli.split_at_dashes(words)
    assert cli.parse(config, own, job, "")
    if job == "submit":
        assert cli.parse(TrainConfig, flags, "train", "")


def test_help_groups_flags_by_use_and_shows_the_common_ones_first(capsys: pytest.CaptureFixture[str]) -> None:
    shown = helped("train", capsys)
    _, *boxes = re.split(r"^\W*(\w*) ?options\W*$", shown, flags=re.MULTILINE)
    titles = boxes[::2]
    assert titles[:4] == ["", "model", "diffusion", "optimizer"]
    assert {"hardware", "validation", "tracking"} < set(titles)
    common, *_, tracking = boxes[1::2]
    assert all(f" {flag} " in common for flag in ("--data", "--output", "--steps", "--workers", "--resume"))
    assert "--tracking-patience" in tracking and "--tracking-patience" not in common
    assert "The UNet that predicts epsilon." in shown


@pytest.mark.parametrize("cls", CONFIGS)
def test_groups_begin_at_settings_and_have_names_of_their_own(cls: type) -> None:
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for start, group in getattr(cls, "help_groups", {}).items():
        assert start in names and group not in names


def test_every_setting_of_a_group_reaches_the_configuration() -> None:
    words = ["--data", "d", "--output", "o", "--cache-gb", "3", "--experiment", "e", "--model-channels", "8"]
    found = cli.parse(TrainConfig, [*words, "--source", "idx", "--split", "a", "b"], "train", "")
    assert (found.cache_gb, found.experiment, found.model.model_channels) == (3.0, "e", 8)
    assert (found.reading.source, found.split) == ("idx", ("a", "b"))


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["submit", "--help"]])
def test_help_whose_reader_leaves_ends_silently(words: list[str]) -> None:
    """In `--help | head -1`, for example, the pipe's reader is gone before the job writes."""
    job = subprocess.Popen(
        [sys.executable, "-m", "pipeline.commands", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert job.stdout and job.stderr
    job.stdout.close()
    assert job.stderr.read() == b""
    assert job.wait() == 0
    job.stderr.close()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "learning_rate: 1e-3",
            "did you mean optimizer.learning_rate, written optimizer: {learning_rate: …}?",
        ),
        ("optimizer.learning_rate: 1e-3", "did you mean optimizer.learning_rate, written optimizer: {"),
        (
            "optimizer: {model_channels: 8}",
            "did you mean model.model_channels, written model: {model_channels: …}?",
        ),
        ("optimizer: {learning_rte: 1e-3}", "did you mean optimizer.learning_rate"),
        ("model: {steps: 3}", "did you mean steps, at the top level?"),
        ("stepz: 3", "did you mean steps"),
        ("reading: {sorce: idx}", "did you mean reading.source"),
        ("optimizer: {bogus: 1}", "known keys: adam_betas, clip_norm"),
    ],
)
def test_an_unknown_key_of_a_file_is_answered_with_the_place_of_the_nearest(
    text: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    flags = ["--config", str(tmp_path / "c.yaml"), "--data", "d", "--output", "o"]
    with pytest.raises(InputError, match="unknown key") as refused:
        cli.parse(TrainConfig, flags, "train", "")
    assert says in str(refused.value)
