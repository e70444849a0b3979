"""The ledger: its records, and the ranking of trials."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.tuning import ledger
from pipeline.tuning.ledger import Record, Rung, pareto_front, ranked


def record(number: int, *values: float, status: ledger.Status = "finished", second: float = 0.0) -> Record:
    rungs = tuple(
        Rung(1000 * 3**k, 10 * 3**k, float(k), {"a": value, "b": second}, (value, value + 1))
        for k, value in enumerate(values)
    )
    return Record(number, {"x": number}, {"seed": number}, status, rungs=rungs)


def test_a_record_is_read_as_it_was_written_from_wherever_the_search_was_moved(tmp_path: Path) -> None:
    first = str(tmp_path / "here")
    records = [record(1, 3.0, 2.0), record(0, 3.5, status="stopped"), Record(10, {}, {}, "waiting")]
    for one in records:
        ledger.write(first, one)
    shutil.move(first, tmp_path / "there")
    assert ledger.read_all(str(tmp_path / "there")) == sorted(records, key=lambda one: one.number)
    assert str(tmp_path) not in (tmp_path / "there" / "trials" / "0001" / "trial.json").read_text()


def test_a_record_of_0_1_0_is_read_and_its_training_run_found(tmp_path: Path) -> None:
    now = record(7, 3.0)
    ledger.write(str(tmp_path), now)
    path = tmp_path / "trials" / "0007" / "trial.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"incarnation": 2, "history": ["took over"]}))
    read = ledger.read(str(tmp_path), "0007")
    assert read == replace(now, incarnation=2)
    assert ledger.run_folder(str(tmp_path), read) == tmp_path / "trials" / "0007" / "run-2"


def test_who_got_further_ranks_first_and_then_who_measured_less() -> None:
    records = [
        record(0, 1.0, status="stopped"),
        record(1, 3.0, 2.5),
        record(2, 3.0, 2.0),
        record(3, 9.0, 0.1, status="failed"),
        record(4),
        record(5, 9.0, 0.1, status="interrupted"),
    ]
    assert [one.number for one in ranked(records, "a")] == [2, 1, 0]


def test_the_pareto_front_holds_what_nothing_beats_in_both() -> None:
    records = [
        record(0, 1.0, second=4.0),
        record(1, 2.0, second=3.0),
        record(2, 2.0, second=3.5),
        record(3, 3.0, second=1.0),
        record(4, 0.5, second=0.5, status="stopped"),
    ]
    assert [one.number for one in pareto_front(records, ("a", "b"))] == [0, 1, 3]
    assert pareto_front(records[4:], ("a", "b")) == []


def test_a_figure_that_is_not_finite_in_an_older_ledger_is_a_failed_trial(tmp_path: Path) -> None:
    """Such a record can't be written. An existing one neither wins nor prevents a resume."""
    output = str(tmp_path)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            ledger.write(output, record(0, 3.0, value))
    for number, last in enumerate((2.0, "NaN", "-Infinity")):
        ledger.write(output, record(number, 3.0, 2.0))
        path = tmp_path / "trials" / f"{number:04d}" / "trial.json"
        path.write_text(path.read_text().replace('"a": 2.0', f'"a": {last}'))
    records = ledger.read_all(output)
    assert [one.status for one in records] == ["finished", "failed", "failed"]
    assert records[1].reason == "a figure is not finite after 3000 images"
    assert records[1].rungs == record(1, 3.0).rungs
    assert [one.number for one in ranked(records, "a")] == [0]
    assert [one.number for one in pareto_front(records, ("a", "b"))] == [0]


@pytest.mark.parametrize("content", ["", '{"number": 0, "para', "null", "[1]"])
def test_a_damaged_record_is_named_in_one_line(tmp_path: Path, content: str) -> None:
    ledger.write(str(tmp_path), record(0, 3.0, 2.0))
    path = tmp_path / "trials" / "0000" / "trial.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"trial\.json is damaged: .*: restore it, or remove "):
        ledger.read_all(str(tmp_path))
