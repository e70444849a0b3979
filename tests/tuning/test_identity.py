"""A search that is resumed, moved, copied or stopped touches only its own MLflow runs."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Reading
from pipeline.data.index import Splits, open_splits
from pipeline.errors import InputError
from pipeline.tracking import runs
from pipeline.tuning import ledger
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.identity import SEARCH_FILE, open_search
from pipeline.tuning.ledger import Record, Rung
from pipeline.tuning.search import _end_runs, check_search
from pipeline.tuning.space import parse_space
from tests.jobs.common import database

SPACE = parse_space({"schedule": ["cosine", "linear"]})


@pytest.fixture(scope="module")
def data(digits: Path) -> Splits:
    return open_splits(str(digits))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TuneConfig:
    """Settings of a search with MLflow in a database of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database(tmp_path))
    return TuneConfig("d", str(tmp_path / "search"), experiment="e", resume=True)


def begin(config: TuneConfig, data: Splits) -> tuple[str, dict[str, str]]:
    """Open a search with a finished, a running and an interrupted trial. Return the run ids of search and trials."""
    parent = open_search(config, SPACE, data)
    children = {}
    for number, status in enumerate(("finished", "running", "interrupted")):
        child = runs.open_run("e", f"trial {number}", {}, 10, parent.id)
        rungs = (Rung(100, 1, 0.0, {"bits_per_dim": 3.0}),)
        record = Record(number, {}, {}, status, rungs=rungs, run_id=child.id, opening="o")  # type: ignore[arg-type]
        ledger.write(config.output, record)
        children[status] = child.id
    return parent.id, children


def status_of(run_id: str) -> tuple[str, str]:
    info = runs.open_client().get_run(run_id).info
    return info.status, info.lifecycle_stage


def test_a_moved_search_keeps_its_runs_and_a_copy_gets_others(config: TuneConfig, data: Splits) -> None:
    parent, children = begin(config, data)
    copy = replace(config, output=f"{config.output}-copy")
    shutil.copytree(config.output, copy.output)
    later = runs.open_run("e", "trial 3", {}, 10, parent)  # a trial that started after the copy was made

    run = open_search(copy, SPACE, data)
    assert run.id not in (parent, *children.values())
    records = ledger.read_all(copy.output)
    assert [(one.run_id, one.opening) for one in records] == [(children["finished"], "o"), ("", ""), ("", "")]
    for run_id in (parent, later.id, *children.values()):
        assert status_of(run_id) == ("RUNNING", "active")
    assert open_search(copy, SPACE, data).id == run.id

    moved = replace(config, output=f"{config.output}-moved")
    shutil.move(config.output, moved.output)
    assert open_search(moved, SPACE, data).id == parent
    assert [one.run_id for one in ledger.read_all(moved.output)] == list(children.values())


def test_a_search_that_ends_leaves_no_run_running(config: TuneConfig, data: Splits) -> None:
    _, children = begin(config, data)
    _end_runs(config)
    statuses = {status: status_of(run_id)[0] for status, run_id in children.items()}
    # A trial that has ended closes its run itself.
    assert statuses == {"finished": "RUNNING", "running": "KILLED", "interrupted": "RUNNING"}


def test_a_run_that_was_opened_before_its_id_was_written_is_opened_once(config: TuneConfig) -> None:
    config_runs = [runs.open_run("e", "trial", {}, 10, opening="mark") for _ in range(2)]
    assert [status_of(run.id)[1] for run in config_runs] == ["deleted", "active"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"terms": 8}, "terms = 32, now it is 8"),
        ({"features": "other"}, "features = "),
        ({"trials": 99, "searcher": "random", "concurrent": 1, "register": "x"}, ""),
    ],
)
def test_what_a_figure_depends_on_can_not_change(
    config: TuneConfig, data: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "other"):
        Path(name).write_text(name)
    config = replace(config, objective="both", features="first")
    run = open_search(config, SPACE, data)
    shutil.copyfile("first", "same")
    assert open_search(replace(config, features="same"), SPACE, data).id == run.id
    if not says:
        assert open_search(replace(config, **changes), SPACE, data).id == run.id
        return
    with pytest.raises(InputError, match=f"was begun with {says}"):
        open_search(replace(config, **changes), SPACE, data)


def test_other_held_out_images_and_another_file_of_betas_are_refused(
    config: TuneConfig, data: Splits, tmp_path: Path
) -> None:
    betas = tmp_path / "betas.txt"
    betas.write_text("0.1 0.2")
    space = parse_space({"schedule": ["cosine", str(betas)]})
    open_search(config, space, data)
    others = {**data.indexes, "validation": replace(data["validation"], order="another")}
    with pytest.raises(InputError, match="was begun with held_out = "):
        open_search(config, space, replace(data, indexes=others))
    betas.write_text("0.1 0.3")
    with pytest.raises(InputError, match="was begun with schedule_files = "):
        open_search(config, space, data)


def test_a_search_on_an_object_store_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--output memory://bucket/x: .* give a folder that all nodes see"):
        check_search(TuneConfig("d", "memory://bucket/x"))
    assert not list(tmp_path.iterdir())


def test_a_search_is_found_however_its_folder_is_written(config: TuneConfig, data: Splits) -> None:
    open_search(config, SPACE, data)
    with pytest.raises(InputError, match="already holds a search: pass --resume"):
        check_search(replace(config, output=f"file://{config.output}", resume=False))


def test_features_that_can_not_be_read_are_refused_before_anything_starts(
    digits: Path, tmp_path: Path
) -> None:
    config = TuneConfig(
        str(digits), str(tmp_path / "o"), objective="frechet", features="nothing.pt", reading=Reading()
    )
    with pytest.raises(InputError, match=r"--features nothing.pt: can't be read"):
        check_search(config)


def test_trials_without_the_file_that_says_of_which_search_are_not_taken_over(
    config: TuneConfig, data: Splits
) -> None:
    begin(config, data)
    (Path(config.output) / SEARCH_FILE).unlink()
    other = replace(config, seed=7, resume=False)
    with pytest.raises(InputError, match=r"holds trials, but search\.json.* is lost"):
        open_search(other, SPACE, data)
