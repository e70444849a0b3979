"""The ledger of a search: one JSON file for each trial, with everything that a resume and the report need.

It contains no absolute path, so a search can be moved or copied. A trial's file is written whole or not at all: by
the driver when the trial is proposed, then by the trial, and by the driver again if the trial dies.
"""

import itertools
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline import storage
from pipeline.config import from_dict, to_dict
from pipeline.errors import InputError
from pipeline.redact import one_line

Status = Literal["waiting", "running", "finished", "stopped", "failed", "interrupted"]
TRIALS, RECORD = "trials", "trial.json"


@dataclass(frozen=True)
class Rung:
    """A measurement of a trial.

    Attributes:
        images: images of the rung, by which trials are compared.
        step: optimizer step.
        time: seconds since 1970.
        metrics: metrics by name; lower is better for those that are searched.
        per_image: bits/dim of each held-out image, in an order that all trials share; empty if not measured.
        seen: images seen in training, in whole batches; 0 if an older release did not write it.
    """

    images: int
    step: int
    time: float
    metrics: dict[str, float]
    per_image: tuple[float, ...] = ()
    seen: int = 0

    @property
    def is_finite(self) -> bool:
        """True if all metrics are finite numbers."""
        return all(map(math.isfinite, (*self.metrics.values(), *self.per_image)))


@dataclass(frozen=True)
class Record:
    """A trial.

    Attributes:
        number: number of the trial, from 0.
        parameters: Optuna's parameters.
        flags: the training flags that the parameters stand for.
        status: "failed" is final and due to the settings; a resume tries an "interrupted" trial again.
        reason: why it failed or was interrupted.
        rungs: its measurements, in order.
        incarnation: number of its training run's folder; 0 except for population based training in release 0.1.0.
        run_id: its nested MLflow run.
        opening: mark of the attempts to open that run. It identifies the run if a kill came before its id was
            written.
        opening: marks the attempts to open that run, also where a kill came before its id was written here.
    """

    number: int
    parameters: dict[str, Any]
    flags: dict[str, Any]
    status: Status = "waiting"
    reason: str = ""
    rungs: tuple[Rung, ...] = field(default=())
    incarnation: int = 0
    run_id: str = ""
    opening: str = ""

    @property
    def name(self) -> str:
        """The name of the trial's folder, and of the trial in Ray Tune and MLflow."""
        return f"{self.number:04d}"

    @property
    def over(self) -> bool:
        """True if nothing is left to run."""
        return self.status in ("finished", "stopped", "failed")

    @property
    def lost(self) -> bool:
        """True if it failed, finally or until a resume."""
        return self.status in ("failed", "interrupted")

    @property
    def images(self) -> int:
        """Images of the rung at which it was last measured."""
        return self.rungs[-1].images if self.rungs else 0

    @property
    def seen(self) -> int:
        """Images seen in training at its last measurement."""
        return (self.rungs[-1].seen or self.images) if self.rungs else 0

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last measurement."""
        return self.rungs[-1].metrics if self.rungs else {}


def folder(output: str, name: str) -> Path:
    """Folder of a trial."""
    return Path(output) / TRIALS / name


def run_folder(output: str, record: Record) -> Path:
    """Folder of a trial's training run."""
    return folder(output, record.name) / f"run-{record.incarnation}"


def write(output: str, record: Record) -> None:
    """Writes a trial's file."""
    uri = str(folder(output, record.name) / RECORD)
    storage.write_atomic(uri, json.dumps(to_dict(record), indent=1, allow_nan=False).encode())


def read(output: str, name: str) -> Record:
    """Reads a trial's file. If it holds a metric that is not finite, the trial is read as failed.

    Raises:
        InputError: the file is damaged, can't be read now, or another program wrote it.
    """
    path = folder(output, name) / RECORD
    with storage.reporting(f"{path} can't be read"):
        data = path.read_bytes()
    try:
        values = dict(json.loads(data))
    except (ValueError, TypeError) as error:
        advice = f"restore it, or remove {path.parent} to leave this trial out"
        raise InputError(f"{path} is damaged: {one_line(error)}: {advice}") from None
    values.pop("history", None)  # release 0.1.0: history of population based training
    record = from_dict(Record, values, str(path))
    if all(rung.is_finite for rung in record.rungs):
        return record
    rungs = tuple(itertools.takewhile(lambda rung: rung.is_finite, record.rungs))
    reason = f"a figure is not finite after {record.rungs[len(rungs)].images} images"
    return replace(record, status="failed", reason=reason, rungs=rungs)


def read_all(output: str) -> list[Record]:
    """All trials, in order of their numbers."""
    paths = sorted((Path(output) / TRIALS).glob(f"*/{RECORD}"))
    return sorted((read(output, path.parent.name) for path in paths), key=lambda record: record.number)


def ranked(records: list[Record], metric: str) -> list[Record]:
    """Measured trials, best first: by the furthest rung, then by the metric there."""
    measured = [record for record in records if metric in record.metrics and not record.lost]
    return sorted(measured, key=lambda record: (-record.images, record.metrics[metric]))


def pareto_front(records: list[Record], metrics: tuple[str, ...]) -> list[Record]:
    """The finished trials that no other trial dominates: is at least as good in all metrics and better in one."""
    done = sorted(
        (record for record in records if record.status == "finished"),
        key=lambda record: [record.metrics[name] for name in metrics],
    )
    values = np.array([[record.metrics[name] for name in metrics] for record in done])
    return [record for record, mine in zip(done, values, strict=True) if not dominating(values, mine).any()]


def dominating(values: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Bool [N], True for each row of `values` [N, M] that dominates `mine` [M]: no worse in any column, better in one."""
    return np.logical_and((values <= mine).all(axis=1), (values < mine).any(axis=1))
