"""The way of numbers from rank 0 to the driver: a mailbox actor that the driver empties.

`ray.train.report` is a barrier that waits for the controller's next poll; a curve's point should cost nothing.
Rank 0 posts without waiting, the driver writes what it finds to MLflow and to the terminal.
"""

import json
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.data import storage
from pipeline.display import Display

Point = tuple[int, int, dict[str, float]]
POLL_SECONDS = 0.5


@ray.remote(num_cpus=0, max_restarts=-1)
class Mailbox:
    """Points that rank 0 has posted and the driver has not yet taken."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._reason = ""
        self._quarantined: dict[str, str] = {}

    def quarantine(self, bad: dict[str, str]) -> None:
        """Notes images that could not be decoded, and why: from any rank, the same one perhaps again and again."""
        self._quarantined |= bad

    def quarantined(self) -> dict[str, str]:
        return self._quarantined

    def stop(self, reason: str) -> None:
        """Says that the run can't go on, however often the worker group is restarted."""
        self._reason = self._reason or reason

    def reason_to_stop(self) -> str:
        return self._reason

    def post(self, point: Point) -> None:
        self._points.append(point)

    def take(self) -> list[Point]:
        points, self._points = self._points, []
        return points


def open_mailbox() -> Any:
    """A mailbox on the driver's own node: it lives as long as the driver, whatever happens to other nodes."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class Quarantine:
    """Keeps a file with the images that could not be decoded, like that of jobs/prepare.py."""

    def __init__(self, uri: str, mailbox: Any) -> None:
        self._uri, self._mailbox, self._written = uri, mailbox, 0

    def write(self) -> None:
        """Brings the file up to date, and says so."""
        try:
            bad: dict[str, str] = ray.get(self._mailbox.quarantined.remote(), timeout=10)
        except (ray.exceptions.RayError, ConnectionError):
            return
        if len(bad) == self._written:
            return
        lines = [json.dumps({"path": path, "reason": bad[path]}, ensure_ascii=False) for path in sorted(bad)]
        storage.write_atomic(self._uri, "".join(line + "\n" for line in lines).encode())
        self._written = len(bad)
        print(f"{len(bad)} images can't be decoded: listed in {self._uri}", file=sys.stderr, flush=True)


class Courier:
    """Empties the mailbox in a thread of the driver, until the `with` block ends."""

    def __init__(self, mailbox: Any, display: Display, deliver: Callable[[list[Point]], None]) -> None:
        self._mailbox, self._display, self._deliver = mailbox, display, deliver
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="metrics-courier")
        self.latest: dict[str, float] = {}

    def _run(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self._round()

    def _round(self) -> None:
        try:
            points: list[Point] = ray.get(self._mailbox.take.remote(), timeout=10)
        except (ray.exceptions.RayError, ConnectionError):
            return  # the node is busy or going down; the next round asks again
        if not points:
            return
        _, step, self.latest = points[-1]
        self._display.update(
            step, f"loss {self.latest['loss']:.4f}  {self.latest['images_per_second']:.0f} images/s"
        )
        self._deliver(points)

    def __enter__(self) -> "Courier":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(timeout=30)
        self._round()
        self._display.close()
