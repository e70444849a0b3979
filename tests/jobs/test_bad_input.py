"""Bad input gets one clear line, exit code 2, and loses nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.commands.__main__ import JOBS, main
from tests.jobs.common import ROOT, Outcome, run_job


@pytest.mark.parametrize("name", JOBS)
def test_help_shows_every_flag_with_its_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "--config FILE.yaml" in shown
    assert "(default: " in shown


@pytest.fixture(scope="module")
def home(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared digits in `digits` and an empty folder `empty`."""
    home = tmp_path_factory.mktemp("bad-input")
    (home / "empty").mkdir()
    (home / "file").write_text("not a folder")
    (home / "digits").symlink_to(digits)
    return home


TRAIN = ("train", "--data", "digits", "--output", "run", "--channel-multipliers", "1", "2")
CASES = {
    "unknown flag": (("train", "--bogus", "1"), "--bogus"),
    "missing required flag": (("train", "--output", "run"), "--data"),
    "missing data folder": (("train", "--data", "nowhere", "--output", "run"), "nowhere"),
    "empty data folder": (("train", "--data", "empty", "--output", "run"), "empty"),
    "batch smaller than workers": ((*TRAIN, "--batch-size", "1", "--workers", "2"), "--batch-size 1"),
    "batch larger than the data": (
        (*TRAIN, "--batch-size", "100000"),
        "--batch-size 100000 is more than the",
    ),
    "loss that leaves the variance as it is": (
        (*TRAIN, "--variance", "learned_range"),
        "--loss simple does not train --variance learned_range",
    ),
    "a number outside of its range": ((*TRAIN, "--label-dropout", "3"), "--label-dropout 3.0: must be"),
    "unknown schedule": ((*TRAIN, "--schedule", "liner"), "cosine"),
    "T below one": ((*TRAIN, "--timesteps", "0"), "--timesteps 0: must be"),
    "image size the UNet can't take": (
        ("train", "--data", "digits", "--output", "run", "--channel-multipliers", "1", "1", "1", "1", "1"),
        "16",
    ),
    "unwritable output": ((*TRAIN[:3], "--output", "file/run", *TRAIN[5:]), "file/run"),
    "no room for a cache": ((*TRAIN, "--cache-gb", "0"), "--cache-gb 0"),
    "a cache that is on no disk": ((*TRAIN, "--cache-dir", "s3://bucket/cache"), "s3://bucket/cache"),
    "no steps": ((*TRAIN, "--steps", "0"), "--steps"),
    "model folder that does not exist": (("generate", "--model", "nowhere", "--output", "s"), "nowhere"),
    "registered model that does not exist": (
        ("generate", "--model", "models:/nobody@newest", "--output", "s"),
        "models:/nobody@newest",
    ),
    "registered model to export that does not exist": (
        ("export", "--model", "models:/nobody@newest", "--output", "e"),
        "models:/nobody@newest",
    ),
    "a file for the demo's folder": (("demo", "--output", "file"), "is a file, not a folder"),
    "unknown source": (("prepare", "--source", "floppy", "--output", "d"), "floppy"),
    "no config file": (("train", "--config", "none.yaml"), "none.yaml"),
    "nothing answers": (("submit", "train", "--address", "http://127.0.0.1:9"), "127.0.0.1:9"),
}


# One case each from the parser of flags, the pipeline after Ray's start, and MLflow, of a job that starts no Ray. A
# process of its own shows whatever these print beside the line.
AS_PROCESSES = ("unknown flag", "missing data folder", "registered model to export that does not exist")


def check(case: str, outcome: Outcome, home: Path) -> None:
    (name, *_), named = CASES[case]
    assert outcome.code == 2, outcome.stderr
    assert outcome.stdout == ""
    # Phases are printed only if they take a second, which any phase may on a slow machine.
    phases = (f"{name}: starting Ray", f"{name}: opening the data")
    message = [line for line in outcome.stderr.strip().splitlines() if line not in phases]
    assert len(message) == 1, outcome.stderr
    assert message[0].startswith(f"{name}: ")
    assert named in message[0]
    assert not (home / "run").exists()


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(case: str, home: Path, job: Callable[..., Outcome]) -> None:
    check(case, job(*CASES[case][0], home=home), home)


@pytest.mark.system
@pytest.mark.parametrize("case", AS_PROCESSES)
def test_a_process_of_its_own_says_and_exits_the_same(case: str, home: Path) -> None:
    check(case, run_job(*CASES[case][0], home=home), home)


def test_a_config_file_gives_defaults_and_flags_override(home: Path, job: Callable[..., Outcome]) -> None:
    (home / "c.yaml").write_text("data: nowhere\noutput: run\nmodel:\n  model_channels: 33\n")
    assert "nowhere" in job("train", "--config", "c.yaml", home=home).stderr
    assert "33" in job("train", "--config", "c.yaml", "--data", "digits", home=home).stderr
    (home / "c.yaml").write_text("dada: x\n")
    assert "dada" in job("train", "--config", "c.yaml", home=home).stderr


def test_readme_names_every_job() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in JOBS:
        assert f"jobs/{name}.py" in readme or f"make {name}" in readme
