"""Orderly ends: before a signal or Ray Train stops the workers, they save a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any, TypeVar

import ray

from pipeline.cluster.autoscaler import FORGET_SECONDS
from pipeline.cluster.ray_internals import (
    ControllerCallback,
    PreemptingState,
    ResizingState,
    RunningState,
    pass_over_deleted_checkpoints,
    wait_for_places,
)
from pipeline.cluster.room import TRAIN_WORKERS, has_workers
from pipeline.errors import Interrupted

T = TypeVar("T")
POLL_SECONDS = 0.2


def run_until_signal(work: Callable[[], T], channel: Any, say: Callable[[str], None]) -> tuple[T, int]:
    """Does the work. The first signal asks the workers to save and end early, a second one ends the process.

    Args:
        work: runs the training.
        channel: handle of the run's `RunChannel`.
        say: called with a line for the user.

    Returns:
        the result of `work`, and the number of the signal; 0 = no signal.

    Raises:
        Interrupted: no worker was running, so there was nothing to save.
    """
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread can handle signals. A trial of Ray Tune runs in another one.
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
    """Yields a list that receives the number of the first SIGTERM or SIGINT. After it the former handlers are back."""
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
    """Saves before Ray Train stops a healthy worker group, to resize it or because a node is about to be removed.

    So elastic training and spot machines lose no finished step. It runs in Ray Train's controller, which waits until the
    workers have saved, for a minute at most.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def after_controller_start(self, train_run_context: Any) -> None:
        pass_over_deleted_checkpoints()
        wait_for_places(FORGET_SECONDS, POLL_SECONDS)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(previous_state, RunningState) and isinstance(
            current_state, (ResizingState, PreemptingState)
        ):
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._channel.save_now.remote())
