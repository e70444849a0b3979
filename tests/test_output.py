"""No job begins in a folder where another job has begun."""

import json
from pathlib import Path

import pytest

from pipeline.config import TrainConfig
from pipeline.data.index import open_splits
from pipeline.data.manifest import UNFINISHED
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.errors import InputError
from pipeline.generation import ledger
from pipeline.output import CLAIMS, check_unclaimed, write_claim
from pipeline.tracking import RUN_FILE
from pipeline.training.checks import check
from pipeline.training.identity import open_run
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.identity import SEARCH_FILE, open_search
from pipeline.tuning.space import parse_space
from pipeline.versions import VERSIONS


def test_every_claim_is_known() -> None:
    assert set(CLAIMS) == {RUN_FILE, SEARCH_FILE, ledger.SETTINGS, UNFINISHED}


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("other", CLAIMS)
def test_a_claim_keeps_other_jobs_out(name: str, other: str, tmp_path: Path) -> None:
    write_claim(str(tmp_path), other, {})
    if name == other:
        check_unclaimed(str(tmp_path), name)
    else:
        with pytest.raises(InputError, match=rf"--output .* holds {CLAIMS[other]}: choose another folder"):
            check_unclaimed(str(tmp_path), name)


def test_files_of_these_names_that_no_job_wrote_keep_nobody_out(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"editor.tabSize": 4}))
    (tmp_path / "run.json").write_text(json.dumps({"versions": None, "fixed": {}}))
    check_unclaimed(str(tmp_path), SEARCH_FILE)


def test_a_claim_without_what_its_job_needs_is_damaged(digits: Path, tmp_path: Path) -> None:
    """Valid JSON with wrong content, as a tool that "repairs" files leaves."""
    output, data = str(tmp_path), open_splits(str(digits))
    config = TrainConfig(str(digits), output, steps=2, batch_size=8, resume=True)
    search = TuneConfig(str(digits), output, resume=True)
    for content in ({}, {"fixed": {}}, {"run_id": 7}, {"fixed": {}, "versions": {}, "run_id": None}, []):
        (tmp_path / RUN_FILE).write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"run\.json is damaged: restore it"):
            open_run(config, check(config)[1], data["train"], output)
        (tmp_path / RUN_FILE).rename(tmp_path / SEARCH_FILE)
        with pytest.raises(InputError, match=r"search\.json is damaged: restore it"):
            open_search(search, parse_space({"batch_size": [8, 16]}), data)
        (tmp_path / SEARCH_FILE).unlink()
    (tmp_path / RUN_FILE).write_text(json.dumps({"fixed": {"image": 3}, "run_id": "r", "versions": VERSIONS}))
    with pytest.raises(InputError, match=r"run\.json: expected a mapping, got int"):
        open_run(config, check(config)[1], data["train"], output)


def test_each_job_looks(digits: Path, prepared_here: None, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    (tmp_path / "out").mkdir()
    data = open_splits(str(digits))
    config = TrainConfig(str(digits), output, steps=2, batch_size=8)
    write_claim(output, SEARCH_FILE, {})
    with pytest.raises(InputError, match="holds a search"):
        prepare(PrepareConfig(output=output, source="digits"))
    with pytest.raises(InputError, match="holds a search"):
        ledger.claim(output, {}, {})
    with pytest.raises(InputError, match="holds a search"):
        open_run(config, check(config)[1], data["train"], output)
    (tmp_path / "out" / SEARCH_FILE).unlink()
    write_claim(output, RUN_FILE, {})
    with pytest.raises(InputError, match="holds a training run"):
        open_search(TuneConfig(str(digits), output), parse_space({"batch_size": [8, 16]}), data)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == [RUN_FILE]
