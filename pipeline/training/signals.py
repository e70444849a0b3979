"""Ends in order: what stops a run, or its worker group, first lets the workers save."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any, TypeVar

import ray

from pipeline.cluster.ray_internals import ControllerCallback, PreemptingState, ResizingState, RunningState
from pipeline.cluster.room import TRAIN_WORKERS, has_workers
from pipeline.errors import Interrupted

T = TypeVar("T")
POLL_SECONDS = 0.2


def run_until_signal(work: Callable[[], T], channel: Any, say: Callable[[str], None]) -> tuple[T, int]:
    """Does the work, and on the first signal asks the workers to save and end it early; a second one ends the process.

    Returns:
        what the work returned, and the signal's number, 0 for none.

    Raises:
        Interrupted: no worker was running, so there is nothing to save.
    """
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # no signals are heard here, as in a Tune trial
        return work(), 0
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    with _first_signal() as heard:
        threading.Thread(target=run, daemon=True, name="train").start()
        asked = False
        while not wait([done], timeout=POLL_SECONDS).done:
            if heard and not asked:
                asked = True
                if not (ray.get(channel.stop.remote()) and has_workers(TRAIN_WORKERS)):
                    raise Interrupted("stopped while no worker ran; go on with --resume", heard[0])
                say("asked to stop: saving; a second signal ends it at once")
        return done.result(), heard[0] if heard else 0


@contextlib.contextmanager
def _first_signal() -> Iterator[list[int]]:
    """The number of the first signal, once it has come; then the former handlers are back in place."""
    heard: list[int] = []
    former: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        restore()

    former = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield heard
    finally:
        restore()


class SaveBeforeShutdown(ControllerCallback):
    """Saves before Ray Train stops a healthy worker group, to resize it or because a node is going away.

    Elastic training and spot machines then lose no step that was made. It runs in Ray Train's controller, and holds
    it up until the workers have saved, a minute at most.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(previous_state, RunningState) and isinstance(
            current_state, (ResizingState, PreemptingState)
        ):
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._channel.save_now.remote())
