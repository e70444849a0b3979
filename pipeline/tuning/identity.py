"""Ties an output folder to one search: its MLflow run, its trials' runs, and the settings that no resume may change."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pipeline import storage
from pipeline.data.index import Splits
from pipeline.errors import InputError
from pipeline.evaluation.config import FRECHET
from pipeline.output import check_claim, check_unclaimed, read_claim, write_claim
from pipeline.tracking import runs
from pipeline.tracking.tracker import FOLDER as UNDELIVERED
from pipeline.tuning import ledger
from pipeline.tuning.config import Scheduler, TuneConfig
from pipeline.tuning.objective import features_digest
from pipeline.tuning.space import Space

SEARCH_FILE = "search.json"
SETTINGS = (
    "objective", "scheduler", "images", "rungs", "reduction", "terms", "max_images", "samples", "sampling_steps", "seed"
)  # fmt: skip
# Seconds that the search waits for MLflow at its start and at its end.
PATIENCE = 60.0


def open_search(config: TuneConfig, space: Space, splits: Splits) -> runs.Run:
    """Opens the parent run of a search: the same run for all resumes and after a move; a copy gets a new run.

    Raises:
        InputError: a resume changes settings that the metrics depend on, or MLflow does not answer.
    """
    output, fixed = config.output, _fixed(config, space, splits)
    if before := read_claim(output, SEARCH_FILE, beside=("run_id",)):
        gone = before["fixed"].get("scheduler") not in get_args(Scheduler)
        hints = {"scheduler": ", which no longer exists" if gone else ""}
        # Older releases did not write these settings.
        defaults = {name: fixed[name] for name in ("held_out", "features", "schedule_files")}
        check_claim(output, before, fixed, defaults, hints)
        if _is_copy(output, before):
            _leave_runs(output)
        elif run := runs.reopen_later(before["run_id"], config.metrics):
            write_claim(output, SEARCH_FILE, fixed, run_id=run.id, place=output)
            return run
    elif ledger.read_all(output):
        raise InputError(
            f"--output {output} holds trials, but {SEARCH_FILE}, which says of which search, is lost: restore it, or "
            "choose another folder"
        )
    else:
        check_unclaimed(output, SEARCH_FILE)
    name = f"search {storage.name(storage.title(config.data))} by {' and '.join(config.metrics)}"
    tags = {"ray_ddpm.search": output, **runs.origin("tune")}
    run = runs.open_run(config.experiment, name, tags, PATIENCE)
    with runs.failed_on_error(run):
        write_claim(output, SEARCH_FILE, fixed, run_id=run.id, place=output)
    return run


def _is_copy(output: str, claim: dict[str, Any]) -> bool:
    """True if this folder was copied, not moved: the search still exists at its recorded place with the same run."""
    place = claim.get("place", output)
    if place == output or not (Path(place) / SEARCH_FILE).exists():
        return False
    there = read_claim(place, SEARCH_FILE)
    return there is not None and there.get("run_id") == claim["run_id"]


def _leave_runs(output: str) -> None:
    """Detaches the unfinished trials of a copy from their MLflow runs, which belong to the original search."""
    for record in ledger.read_all(output):
        if not record.over:
            ledger.write(output, replace(record, run_id="", opening=""))
            storage.remove_folder(str(ledger.run_folder(output, record) / UNDELIVERED))


def _fixed(config: TuneConfig, space: Space, splits: Splits) -> dict[str, Any]:
    """All settings that the metrics depend on."""
    return {
        "data": splits["train"].fingerprint,
        "held_out": splits["validation"].order,
        "features": features_digest(config.features) if FRECHET in config.metrics else "",
        "schedule_files": {
            path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in space.schedule_files
        },
        "space": space.shown,
        **{name: getattr(config, name) for name in SETTINGS},
    }
