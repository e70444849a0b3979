"""The ledger: one JSON file a trial, which says all that a resumed search and the report need.

Nothing in it is an absolute path, so a search can be moved or copied. A trial's file is written whole or not
at all: by the driver when the trial is proposed, then by the trial, and by the driver again if the trial dies.
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

Status = Literal["waiting", "running", "finished", "stopped", "failed", "interrupted"]
TRIALS, RECORD = "trials", "trial.json"


@dataclass(frozen=True)
class Rung:
    """A measurement.

    Attributes:
        images: of the rung, by which trials are compared.
        time: seconds since 1970.
        metrics: by name; lower is better for what is searched.
        per_image: bits/dim of each held-out image, in the order that all trials share; empty if not measured.
        seen: images seen in training: those of the rung in whole batches; 0 where an older release did not write it.
    """

    images: int
    step: int
    time: float
    metrics: dict[str, float]
    per_image: tuple[float, ...] = ()
    seen: int = 0

    @property
    def is_finite(self) -> bool:
        """Whether every figure is a number that others can be compared with."""
        return all(map(math.isfinite, (*self.metrics.values(), *self.per_image)))


@dataclass(frozen=True)
class Record:
    """A trial.

    Attributes:
        parameters: Optuna's.
        flags: the training flags that they stand for.
        status: "failed" is due to the settings and final; of "interrupted" a resume makes another attempt.
        reason: why it failed or was interrupted.
        incarnation: number of its training run's folder; 0, but for population based training in 0.1.0.
        run_id: nested MLflow run.
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
        """The trial's folder, and its name in Ray Tune and MLflow."""
        return f"{self.number:04d}"

    @property
    def over(self) -> bool:
        """Whether nothing of it is left to run."""
        return self.status in ("finished", "stopped", "failed")

    @property
    def lost(self) -> bool:
        """Whether it failed, for good or until a resume."""
        return self.status in ("failed", "interrupted")

    @property
    def images(self) -> int:
        """Of the rung at which it was last measured."""
        return self.rungs[-1].images if self.rungs else 0

    @property
    def seen(self) -> int:
        """Images seen in training at its last measurement."""
        return (self.rungs[-1].seen or self.images) if self.rungs else 0

    @property
    def metrics(self) -> dict[str, float]:
        """What was last measured."""
        return self.rungs[-1].metrics if self.rungs else {}


def folder(output: str, name: str) -> Path:
    """Where a trial lives."""
    return Path(output) / TRIALS / name


def run_folder(output: str, record: Record) -> Path:
    """Where a trial's training run lives."""
    return folder(output, record.name) / f"run-{record.incarnation}"


def write(output: str, record: Record) -> None:
    """Writes a trial's file."""
    uri = str(folder(output, record.name) / RECORD)
    storage.write_atomic(uri, json.dumps(to_dict(record), indent=1, allow_nan=False).encode())


def read(output: str, name: str) -> Record:
    """Reads a trial's file; a measurement in it that is not finite is a failure of the trial.

    Raises:
        InputError: something else wrote it.
    """
    path = folder(output, name) / RECORD
    values = json.loads(path.read_text())
    values.pop("history", None)  # 0.1.0: what population based training did
    record = from_dict(Record, values, str(path))
    if all(rung.is_finite for rung in record.rungs):
        return record
    rungs = tuple(itertools.takewhile(lambda rung: rung.is_finite, record.rungs))
    reason = f"a figure is not finite after {record.rungs[len(rungs)].images} images"
    return replace(record, status="failed", reason=reason, rungs=rungs)


def read_all(output: str) -> list[Record]:
    """Every trial, by number."""
    paths = sorted((Path(output) / TRIALS).glob(f"*/{RECORD}"))
    return sorted((read(output, path.parent.name) for path in paths), key=lambda record: record.number)


def ranked(records: list[Record], metric: str) -> list[Record]:
    """Measured trials, best first: those that got furthest, by their last measurement."""
    measured = [record for record in records if metric in record.metrics and not record.lost]
    return sorted(measured, key=lambda record: (-record.images, record.metrics[metric]))


def pareto_front(records: list[Record], metrics: tuple[str, ...]) -> list[Record]:
    """The finished trials than which no other is at least as good in all metrics and better in one."""
    done = sorted(
        (record for record in records if record.status == "finished"),
        key=lambda record: [record.metrics[name] for name in metrics],
    )
    values = np.array([[record.metrics[name] for name in metrics] for record in done])
    return [record for record, mine in zip(done, values, strict=True) if not dominating(values, mine).any()]


def dominating(values: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Which rows are at least as good as `mine` in all columns and better in one: bool [N] of [N, M], lower is better."""
    return np.logical_and((values <= mine).all(axis=1), (values < mine).any(axis=1))
