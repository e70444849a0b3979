"""The channel between a run's workers and its driver: an actor that both call.

Points of curves do not go through `ray.train.report`, which is a barrier that waits for the controller's next poll.
Workers post to the channel without waiting, and the driver reads it (see channel_reader.py). Nothing here imports torch,
which would delay the actor's start by two seconds.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import storage
from pipeline.errors import InputError
from pipeline.evaluation.config import BITS_PER_DIM
from pipeline.patience import patiently
from pipeline.tracking import Point

T = TypeVar("T")
# Every point of the training curve has the first value, every point of the validation curve the second.
CURVES = ("loss", BITS_PER_DIM)
SAVE_SECONDS = 60
QUARANTINE = "quarantine.jsonl"


class Command(IntEnum):
    """A command from the driver to the workers. The larger one wins."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


@dataclass
class Messages:
    """Messages from the workers.

    Attributes:
        points: time (Unix, ms), step and values of each point of a curve.
        files: path in the run's output, and contents.
        notices: lines for the user.
        phase: the workers' present activity; "" = unchanged.
    """

    points: list[Point] = field(default_factory=list)
    files: list[tuple[str, bytes]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    phase: str = ""

    def add(self, other: "Messages") -> None:
        """Appends later messages."""
        self.points += other.points
        self.files += other.files
        self.notices += other.notices
        self.phase = other.phase or self.phase


@ray.remote(num_cpus=0, max_restarts=-1)
class RunChannel:
    """Holds the workers' messages until the driver takes them, and the driver's commands.

    Args:
        bad: known undecodable images, with the reason for each.
    """

    def __init__(self, bad: dict[str, str]) -> None:
        self._messages, self._taken, self._takes = Messages(), Messages(), 0
        self._reason: InputError | None = None
        self._bad = dict(bad)
        self._running = False
        self._commands: list[Command] = []
        self._changed = asyncio.Condition()
        self._saved = asyncio.Event()

    async def give_up(self, reason: InputError) -> None:
        """Records why the run can't continue even if the worker group is restarted."""
        self._reason = self._reason or reason

    async def reason_to_give_up(self) -> InputError | None:
        return self._reason

    async def begin(self, step: int, workers: int) -> int:
        """Records that a worker group begins its steps. Returns the number of commands given before."""
        if self._running:
            self._messages.notices.append(f"the workers were restarted: {workers} continue from step {step}")
        self._running = True
        return len(self._commands)

    async def stop(self) -> bool:
        """Tells the workers to save and end. Returns True if any worker group has begun its steps."""
        await self._command(Command.STOP)
        return self._running

    async def save_now(self) -> None:
        """Tells the workers to save and continue. Returns when the checkpoint is written, or after a minute."""
        self._saved.clear()
        await self._command(Command.SAVE)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._saved.wait(), SAVE_SECONDS)

    async def saved(self) -> None:
        """Records that the workers have saved."""
        self._saved.set()

    async def next_command(self, seen: int) -> tuple[Command, int]:
        """Waits for a command after the first `seen` ones. A stop applies to all later worker groups as well.

        Returns:
            the strongest new command, and the number of commands so far.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._commands) > seen or Command.STOP in self._commands)
        return max(self._commands[seen:], default=Command.STOP), len(self._commands)

    async def _command(self, what: Command) -> None:
        async with self._changed:
            self._commands.append(what)
            self._changed.notify_all()

    async def post_points(self, points: list[Point]) -> None:
        self._messages.points += points

    async def post_file(self, path: str, content: bytes) -> None:
        self._messages.files.append((path, content))

    async def notice(self, line: str) -> None:
        self._messages.notices.append(line)

    async def phase(self, what: str) -> None:
        """Records the workers' present activity; see `Display.phase`."""
        self._messages.phase = what

    async def quarantine(self, bad: dict[str, str]) -> None:
        """Adds to the list of undecodable images. Every epoch finds the same ones, so each is listed once.

        Args:
            bad: reason for each image, by path.
        """
        known = len(self._bad)
        self._bad |= bad
        if len(self._bad) > known:
            lines = (
                json.dumps({"path": path, "reason": reason}, ensure_ascii=False)
                for path, reason in sorted(self._bad.items())
            )
            self._messages.files.append((QUARANTINE, "".join(line + "\n" for line in lines).encode()))
            self._messages.notices.append(
                f"{len(self._bad)} images can't be decoded: see {QUARANTINE} of the output"
            )

    async def take(self, received: int) -> tuple[int, Messages]:
        """Returns the messages since the last answer that the driver received, and the number of this answer.

        The messages of an answer that did not reach the driver are part of the next one.

        Args:
            received: number of the last answer that the driver received; 0 = none.
        """
        if received == self._takes:
            self._taken = Messages()
        self._taken.add(self._messages)
        self._messages = Messages()
        self._takes += 1
        return self._takes, self._taken


def read_quarantine(output: str) -> dict[str, str]:
    """The undecodable images that a run found before it was resumed: reason by path."""
    uri = storage.join(output, QUARANTINE)
    known = {}
    for line in storage.read_many([uri]).get(uri, b"").decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged; the run finds that image again
            entry = json.loads(line)
            known[entry["path"]] = entry["reason"]
    return known


def open_channel(bad: dict[str, str]) -> Any:
    """Starts a channel on the driver's own node, so that the loss of another node does not end it.

    Args:
        bad: known undecodable images: reason by path.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return RunChannel.options(scheduling_strategy=here).remote(bad)  # type: ignore[attr-defined]


class PatientOnChannel:
    """`patiently` for any process of a run. It tells the user about a wait, and a wait without success ends the run.

    Args:
        channel: handle of the run's `RunChannel`.
        seconds: time after which it gives up.
    """

    def __init__(self, channel: Any, seconds: float) -> None:
        self._channel, self._seconds = channel, seconds

    def __call__(self, do: Callable[[], T], what: str) -> T:
        try:
            return patiently(do, what, self._seconds, self._channel.notice.remote)
        except InputError as error:
            advice = "go on with --resume: what is written is whole"
            ray.get(self._channel.give_up.remote(type(error)(f"{error}; {advice}")))
            raise
