"""What bad input gets: one clear line that says what is wrong, exit code 2, nothing lost."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.jobs.common import ROOT, command, environment, run_job

JOBS = ("prepare", "train", "tune", "generate", "evaluate", "plot", "submit", "demo")


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    home = tmp_path_factory.mktemp("help")

    def ask(job: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(job, "--help"), env=environment(home), capture_output=True, text=True, timeout=120
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(JOBS, pool.map(ask, JOBS), strict=True))


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_every_flag_with_its_default(
    job: str, helps: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    shown = helps[job]
    assert shown.returncode == 0
    assert "--config FILE.yaml" in shown.stdout
    assert "(default: " in shown.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared digits in `digits` and an empty folder `empty`."""
    home = tmp_path_factory.mktemp("bad-input")
    (home / "empty").mkdir()
    (home / "file").write_text("not a folder")
    assert run_job("prepare", "--output", home / "digits", home=home).code == 0
    return home


TRAIN = ("train", "--data", "digits", "--output", "run", "--channel-multipliers", "1", "2")
CASES = {
    "unknown flag": (("train", "--bogus", "1"), "--bogus"),
    "missing required flag": (("train", "--output", "run"), "--data"),
    "missing data folder": (("train", "--data", "nowhere", "--output", "run"), "nowhere"),
    "empty data folder": (("train", "--data", "empty", "--output", "run"), "empty"),
    "batch smaller than workers": ((*TRAIN, "--batch-size", "1", "--workers", "2"), "--batch-size 1"),
    "unknown schedule": ((*TRAIN, "--schedule", "liner"), "cosine"),
    "T below one": ((*TRAIN, "--timesteps", "0"), "timesteps"),
    "image size the UNet can't take": (
        ("train", "--data", "digits", "--output", "run", "--channel-multipliers", "1", "1", "1", "1", "1"),
        "16",
    ),
    "unwritable output": ((*TRAIN[:3], "--output", "file/run", *TRAIN[5:]), "file/run"),
    "no steps": ((*TRAIN, "--steps", "0"), "--steps"),
    "model folder that does not exist": (("generate", "--model", "nowhere", "--output", "s"), "nowhere"),
    "registered model that does not exist": (
        ("generate", "--model", "models:/nobody@newest", "--output", "s"),
        "models:/nobody@newest",
    ),
    "unknown source": (("prepare", "--source", "floppy", "--output", "d"), "floppy"),
    "no config file": (("train", "--config", "none.yaml"), "none.yaml"),
    "nothing answers": (("submit", "train", "--address", "http://127.0.0.1:9"), "127.0.0.1:9"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(case: str, home: Path) -> None:
    (job, *flags), named = CASES[case]
    outcome = run_job(job, *flags, home=home)
    assert outcome.code == 2, outcome.stderr
    assert outcome.stdout == ""
    message = outcome.stderr.strip().splitlines()
    assert len(message) == 1, outcome.stderr
    assert message[0].startswith(f"{job}: ")
    assert named in message[0]
    assert not (home / "run").exists()


def test_a_config_file_gives_defaults_and_flags_override(home: Path) -> None:
    (home / "c.yaml").write_text("data: nowhere\noutput: run\nmodel:\n  model_channels: 33\n")
    assert "nowhere" in run_job("train", "--config", "c.yaml", home=home).stderr
    assert "33" in run_job("train", "--config", "c.yaml", "--data", "digits", home=home).stderr
    (home / "c.yaml").write_text("dada: x\n")
    assert "dada" in run_job("train", "--config", "c.yaml", home=home).stderr


def test_readme_names_every_job() -> None:
    readme = (ROOT / "README.md").read_text()
    for job in JOBS:
        assert f"jobs/{job}.py" in readme or f"make {job}" in readme
