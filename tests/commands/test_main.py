"""`ray-ddpm JOB` runs each job from any folder. Without the environment a job says how to set it up."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.commands.__main__ import JOBS, main
from tests.jobs.common import ROOT, environment

BIN = Path(sys.executable).parent


def test_help_lists_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {job} " in shown for job in JOBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ray-ddpm 0.")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "(did you mean train?): give one of prepare, train"),
        (["x"], "no job 'x': give one of"),
        ([], "usage"),
    ],
)
def test_what_is_no_job_is_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err
    assert not words or err.count("\n") == 1


def test_the_command_and_the_script_are_the_same_job_from_any_folder(tmp_path: Path) -> None:
    def ask(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, words)),
            cwd=tmp_path,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=120,
        )

    with ThreadPoolExecutor(2) as both:
        command = both.submit(ask, BIN / "ray-ddpm", "prepare", "--help")
        script = both.submit(ask, sys.executable, ROOT / "jobs" / "prepare.py", "--help")
    by_command, by_script = command.result(), script.result()
    assert (by_command.returncode, by_script.returncode) == (0, 0)
    assert by_command.stdout.startswith("usage: ray-ddpm prepare ")
    assert by_script.stdout.startswith("usage: jobs/prepare.py ")
    flags = [
        {word for word in done.stdout.split() if word.startswith("--")} for done in (by_command, by_script)
    ]
    assert flags[0] == flags[1] and "--image-size" in flags[0]


def test_a_wrong_flag_is_named_with_where_to_find_the_right_ones(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--bogus", "1"]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "--bogus" in err and "ray-ddpm prepare --help" in err


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a Python without installed packages."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


@pytest.mark.parametrize("job", JOBS)
def test_without_the_environment_a_job_says_how_to_set_it_up(job: str, bare: Path, tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [bare, ROOT / "jobs" / f"{job}.py", "--help"], cwd=tmp_path, env=kept, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{job}: this Python ({bare}) has no package 'pipeline': `make setup`")


def test_another_checkouts_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    for name in ("_launch.py", "train.py"):
        (tmp_path / "jobs" / name).write_text((ROOT / "jobs" / name).read_text())
    done = subprocess.run(
        [sys.executable, tmp_path / "jobs" / "train.py", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"runs the code of {ROOT}, not of {tmp_path}" in done.stderr


@pytest.mark.system
def test_an_installed_package_has_the_command_and_sends_itself_to_a_cluster(tmp_path: Path) -> None:
    """After `pip install .` the package needs no file of the checkout."""
    place, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = tmp_path / "checkout"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "pipeline").rglob("*"):
        if path.is_file() and path.suffix in (".py", ".yaml", ".html"):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, copy],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    ask = (
        "import json, zipfile, pipeline; from pathlib import Path; from pipeline.cluster import session, packing;"
        "assert session.checkout() is None;"
        "packing.pack(session.PACKAGE, Path('t.zip'), 20, base=session.PACKAGE.parent);"
        "names = zipfile.ZipFile('t.zip').namelist(); print(json.dumps([pipeline.__file__, names]))"
    )
    env = environment(elsewhere) | {"PYTHONPATH": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=elsewhere, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    file, names = json.loads(done.stdout)
    assert file.startswith(str(place))
    assert {
        "pipeline/commands/__main__.py",
        "pipeline/commands/train.py",
        "pipeline/tuning/report.html",
        "pipeline/tuning/space.yaml",
    } <= set(names)
    assert all(name.startswith("pipeline/") for name in names)
    # A node can run the package that it unpacks without anything else.
    zipfile.ZipFile(elsewhere / "t.zip").extractall(elsewhere / "node")
    words = "-m", "pipeline.commands", "train", "--help"
    unpacked = subprocess.run(
        [sys.executable, *words], cwd=elsewhere / "node", env=env, capture_output=True, text=True
    )
    assert unpacked.returncode == 0 and "usage: ray-ddpm train" in unpacked.stdout
    shown = subprocess.run(
        [sys.executable, place / "bin" / "ray-ddpm", "--help"],
        cwd=elsewhere,
        env=env,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and "usage: ray-ddpm JOB" in shown.stdout
