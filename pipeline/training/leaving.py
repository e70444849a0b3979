"""Before Ray Train stops a healthy worker group, to resize it or because a node is going away, the group saves.

Elastic training and spot machines then lose no step that was made.
"""

import contextlib
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, ResizingState, RunningState


class SaveBeforeLeaving(ControllerCallback):
    """Runs in Ray Train's controller; holds it up until the workers have saved, a minute at most."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(previous_state, RunningState) and isinstance(
            current_state, (ResizingState, PreemptingState)
        ):
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._mailbox.save_now.remote())
