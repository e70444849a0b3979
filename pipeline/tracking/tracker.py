"""An MLflow run that accepts everything at once and delivers it from a thread, in order.

MLflow may not answer for minutes. Training neither waits for it nor loses a point: undelivered items are kept in the
folder `undelivered` of the run's output, and the next resume delivers them.
"""

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from pipeline import storage
from pipeline.errors import Interrupted
from pipeline.patience import FIRST_PAUSE, LONGEST_PAUSE
from pipeline.redact import one_line, redact
from pipeline.tracking import Point, registry, runs
from pipeline.tracking.address import tracking_uri

FOLDER = "undelivered"
# Seconds for the last delivery of an interrupted job, because whoever sent the signal will soon kill it.
HURRIED = 10.0
# From this many waiting items on, items are written to the output even if MLflow has not failed.
MANY = 8


@dataclass(eq=False)  # compared by identity, so that removing one of several equal items is exact
class _Item:
    """An item to deliver.

    Attributes:
        number: its place in the order, which continues from one job on an output to the next.
        kind: name of the delivery; see `Tracker._deliver`.
        content: arguments of the delivery, representable as JSON.
        kept: True if the output has a copy.
    """

    number: int
    kind: str
    content: list[Any]
    kept: bool = False

    @property
    def is_artifact(self) -> bool:
        """True if it goes to the artifact store, which fails independently of the server."""
        return self.kind in ("file", "config", "model")


class Tracker:
    """Logs to an MLflow run until the `with` block ends, or `close` is called.

    Args:
        run: the run; its last steps are None if MLflow could not be asked.
        output: URI of the run's output, which holds its files and the exported model.
        curves: a point belongs to the first of these curves for which it has a value. A curve has one point for each
            step.
        seconds: time that MLflow has at the end of the block to take the remaining items.
        say: called with a line when MLflow fails, and at the end if some items were not delivered.
        lost: event that is set when another driver takes over the output. From then on nothing is delivered.
    """

    def __init__(
        self,
        run: runs.Run,
        output: str,
        curves: tuple[str, ...],
        seconds: float,
        say: Callable[[str], object],
        lost: threading.Event,
    ) -> None:
        self.run, self._output, self._curves = run, output, curves
        self._seconds, self._say, self.lost = seconds, say, lost
        self._items = deque(self._kept_before())
        self._has_kept = bool(self._items)
        self._last = self._items[-1].number if self._items else 0
        # By curve: the last step that MLflow has (None: not asked yet), and the last step that was ever logged.
        self._delivered = run.last_steps
        self.last_steps = dict(run.last_steps or {})
        for item in self._items:
            if item.kind == "points":
                self._fresh(item.content[0])
        self._changed, self._closing = threading.Condition(), threading.Event()
        self._given_up, self._why, self._refused = False, "", set[str]()
        self._thread = threading.Thread(target=self._deliver_all, daemon=True, name="mlflow")
        self.model = ""
        self._thread.start()

    def log_points(self, points: list[Point]) -> list[Point]:
        """Adds points to the curves, and returns those whose step the curve did not have yet."""
        if fresh := self._fresh(points):
            self._add("points", fresh)
        return fresh

    def log_file(self, path: str) -> None:
        """Uploads a file of the output; `path` is relative to the output."""
        self._add("file", path)

    def log_dataset(self, uri: str, fingerprint: str, rows: int, quarantined: int) -> None:
        """See `runs.log_dataset`."""
        self._add("dataset", uri, fingerprint, rows, quarantined)

    def log_params(self, params: dict[str, Any]) -> None:
        """See `runs.log_params`."""
        self._add("params", params)

    def log_config(self, config: dict[str, Any]) -> None:
        """See `runs.log_config`."""
        self._add("config", config)

    def log_model(self, folder: str, name: str, alias: str) -> None:
        """See `registry.log_model`. After delivery, `model` is the name that it returned."""
        self._add("model", folder, name, alias)

    def end(self, status: str = "FINISHED", reason: str = "") -> None:
        """See `runs.end_run`."""
        self._add("end", status, reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(hurried=isinstance(error, (Interrupted, KeyboardInterrupt)))

    def close(self, hurried: bool = False) -> None:
        """Waits until MLflow has taken all items or has failed for too long. The remaining items are kept and reported.

        Args:
            hurried: True if a signal ended the job.
        """
        with self._changed:
            self._closing.set()
            self._changed.notify()
        began, seconds = time.monotonic(), min(self._seconds, HURRIED) if hurried else self._seconds
        while self._thread.is_alive():
            self._thread.join(0.1)
            if not (self._why or hurried):  # uploading a large model may take long
                began = time.monotonic()
            elif time.monotonic() - began >= seconds:
                break
        self._given_up = True
        if self.lost.is_set():
            return
        if not self._items:
            if self._has_kept:
                with contextlib.suppress(Exception):
                    storage.remove_folder(storage.join(self._output, FOLDER))
        else:
            self._keep()
            kinds = ", ".join(dict.fromkeys(item.kind for item in list(self._items)))
            kept = all(item.kept for item in list(self._items))
            where = (
                "--resume delivers it" if kept else f"{storage.join(self._output, FOLDER)} can't be written"
            )
            self._say(f"MLflow did not take everything ({kinds}): {where}; {self._why or 'it is slow'}")

    def _add(self, kind: str, *content: Any) -> None:
        with self._changed:
            self._last += 1
            self._items.append(_Item(self._last, kind, list(content)))
            self._changed.notify()
        # Settings and data are kept at once, because a resume may have others. All items are if MLflow fails or is slow.
        if self._why or kind in ("params", "config", "dataset") or len(self._items) > MANY:
            self._keep()

    def _fresh(self, points: list[Point]) -> list[Point]:
        """The points whose step their curve does not have yet."""
        fresh = []
        for point in points:
            curve = self._curve(point)
            if not curve or point[1] > self.last_steps.get(curve, -1):
                fresh.append(point)
                self.last_steps[curve] = point[1]
        return fresh

    def _curve(self, point: Point) -> str:
        return next((name for name in self._curves if name in point[2]), "")

    def _deliver_all(self) -> None:
        """Delivers items until the block has ended and nothing is left, or another driver has the output."""
        pause, failing = FIRST_PAUSE, set[bool]()  # what fails now: True = artifacts, False = the rest
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closing.is_set())
            if not self._items or self.lost.is_set() or self._given_up:
                return
            if (item := self._next(failing)) is None:
                if self._closing.wait(pause):
                    time.sleep(min(pause, 1.0))
                pause, failing = min(2 * pause, LONGEST_PAUSE), set()
                continue
            try:
                self._deliver(item.kind, item.content)
            except Exception as error:  # MLflow and its stores raise errors of any kind
                if not runs.is_refused(error):
                    failing.add(item.is_artifact)
                    self._note_failure(item.kind, one_line(error))
                    continue
                if item.kind not in self._refused:
                    self._refused.add(item.kind)
                    self._say(f"MLflow refuses {item.kind}: {one_line(error)}")
            if not failing:
                pause, self._why = FIRST_PAUSE, ""
            if item.kept:
                with contextlib.suppress(Exception):  # delivering it again changes nothing
                    storage.remove(self._place(item))
            self._items.remove(item)

    def _next(self, failing: Container[bool]) -> _Item | None:
        """The first item that does not fail now. The end of the run comes after all others."""
        able = [item for item in list(self._items) if item.is_artifact not in failing]
        return next((item for item in able if item.kind != "end"), able[0] if able else None)

    def _deliver(self, kind: str, content: list[Any]) -> None:
        run = self.run
        if self._delivered is None:
            if (reopened := runs.reopen_run(run.id, self._curves)) is None:
                raise RuntimeError(f"it no longer has run {run.id}: the next --resume opens another")
            self._delivered = reopened.last_steps or {}
        if kind == "points":
            known = self._delivered
            runs.log_points(run, [p for p in content[0] if p[1] > known.get(self._curve(p), -1)])
        elif kind == "file":
            if storage.exists(uri := storage.join(self._output, content[0])):
                runs.log_bytes(run, content[0], storage.read_bytes(uri))
            else:
                self._say(f"{uri} no longer exists: MLflow does not get it")
        elif kind == "dataset":
            runs.log_dataset(run, *content)
        elif kind == "params":
            runs.log_params(run, *content)
        elif kind == "config":
            runs.log_config(run, *content)
        elif kind == "model":
            self.model = registry.log_model(run, *content)
        else:
            runs.end_run(run, *content)

    def _note_failure(self, kind: str, why: str) -> None:
        if not self._why:
            place = storage.join(self._output, FOLDER)
            self._say(
                f"MLflow at {redact(tracking_uri())} does not take {kind}: {why}; {place} keeps it until it does"
            )
        self._why = why
        self._keep()

    def _keep(self) -> None:
        """Writes undelivered items that are not kept yet to the output."""
        for item in list(self._items):
            if not item.kept and not self.lost.is_set():
                content = json.dumps({"kind": item.kind, "content": item.content}).encode()
                try:
                    storage.write_atomic(self._place(item), content)
                except Exception:  # the storage fails too; the next attempt tries again
                    return
                item.kept = self._has_kept = True

    def _kept_before(self) -> list[_Item]:
        """The items that earlier jobs on the output kept, in order, without those that this job logs again itself."""
        folder, found = storage.join(self._output, FOLDER), []
        files = storage.list_files(folder, (".json",)) if storage.exists(folder) else []
        for uri, content in storage.read_many(files).items():
            try:
                item = _Item(int(storage.name(uri).partition(".")[0]), **json.loads(content), kept=True)
            except (ValueError, TypeError):
                self._say(f"{uri} is damaged: MLflow does not get it")
                continue
            if item.kind in ("model", "end"):
                storage.remove(uri)
            else:
                found.append(item)
        return sorted(found, key=lambda item: item.number)

    def _place(self, item: _Item) -> str:
        return storage.join(self._output, FOLDER, f"{item.number:06d}.json")
