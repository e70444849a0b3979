"""The documents' links and names exist, and their commands and outputs are those of the code."""

import ast
import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import pytest

from pipeline.cluster.submit import SubmitConfig
from pipeline.commands import cli
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.errors import InputError
from tests.test_architecture import modules
from tests.test_ranges import CONFIGS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@each_document
def test_links_lead_to_files_of_the_repository(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


def test_every_proof_that_the_mathematics_names_is_a_test() -> None:
    text = (ROOT / "docs" / "mathematics.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(named) > 10
    assert named <= defined


@cache
def names_in(file: str) -> frozenset[str]:
    """Return the names that a Python file defines at its top level, and `CLASS.METHOD` of its classes."""
    found = set[str]()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {ast.unparse(target) for target in targets}
        elif name := getattr(node, "name", ""):
            found.add(name)
            found |= {f"{name}.{part.name}" for part in getattr(node, "body", ()) if hasattr(part, "name")}
    return frozenset(found)


def test_every_file_and_name_of_the_architecture_exists() -> None:
    """In the document a name stands on the same line as its file, behind it."""
    checked = 0
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        file = ""
        for span in re.findall(r"`([^`]+)`", line):
            if re.fullmatch(r"(pipeline|jobs|tests|docs|benchmarks|examples)/[\w/.-]+", span):
                assert (ROOT / span).exists(), span
                file, checked = span if span.endswith(".py") else "", checked + 1
            elif file and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)?", span):
                assert span in names_in(file), f"{span} is not in {file}"
                checked += 1
    assert checked > 100


def test_the_readme_shows_every_part_of_the_package() -> None:
    tree = (ROOT / "README.md").read_text().partition("## Where things are")[2]
    missing = {name for name in modules() if f"{name}/" not in tree and f"{name}.py" not in tree}
    assert not missing


def test_the_reference_is_that_of_the_docstrings() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "api.py"))["page"]()
    assert (ROOT / "docs" / "api.md").read_text() == page, "out of date: run `python docs/api.py`"


def commands(document: Path) -> list[tuple[str, list[str]]]:
    """Return job and flags of every complete command in a document's code blocks."""
    text = re.sub(r"\\\n\s*", "", document.read_text())
    lines = re.findall(r"^ {4}(?:\$ )?python jobs/(\w+)\.py (.*?)(?:  +#.*)?$", text, re.MULTILINE)
    return [(job, shlex.split(words)) for job, words in lines if "…" not in words]


@each_document
def test_every_command_is_taken_by_its_job_or_gets_the_line_that_is_shown(document: Path) -> None:
    for job, words in commands(document):
        given, inner = cli.split_at_dashes(words)
        if job == "submit":
            config = cli.parse(SubmitConfig, given, job, "")
            job, given = config.job, inner
        try:
            cli.parse(CONFIGS[job], given, job, "")
        except InputError as error:
            assert f"{job}: {str(error).partition(' (see')[0]}" in document.read_text()


def test_commands_are_found() -> None:
    assert {job for job, _ in commands(ROOT / "README.md")} >= CONFIGS.keys() - {"demo"}


def test_the_photos_of_the_first_run_are_prepared_as_it_shows(
    prepared_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "first_run.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], {})
    words = next(
        words for job, words in commands(ROOT / "docs" / "first_run.md") if "--max-bad-fraction" in words
    )
    prepare(cli.parse(PrepareConfig, words, "prepare", ""))
    (said,) = [line for line in capsys.readouterr().err.splitlines() if " is folder: " in line]
    assert said in " ".join(page.split())
