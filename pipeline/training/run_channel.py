"""The channel between a run's workers and its driver: an actor that both call.

`ray.train.report` is a barrier that waits for the controller's next poll; a curve's point should cost nothing.
Workers post without waiting; the driver takes what it finds (see channel_reader.py).
Nothing here imports torch, which would cost the actor's start two seconds.
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
# The value by which a point is known as one of a curve: of the training, and of the validation.
CURVES = ("loss", BITS_PER_DIM)
SAVE_SECONDS = 60
QUARANTINE = "quarantine.jsonl"


class Command(IntEnum):
    """What the driver can tell the workers to do; the larger one wins."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


@dataclass
class Messages:
    """What was posted: points of curves, files by their path in the run's output, lines for the user, a phase."""

    points: list[Point] = field(default_factory=list)
    files: list[tuple[str, bytes]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    phase: str = ""

    def add(self, other: "Messages") -> None:
        """Appends later ones."""
        self.points += other.points
        self.files += other.files
        self.notices += other.notices
        self.phase = other.phase or self.phase


@ray.remote(num_cpus=0, max_restarts=-1)
class RunChannel:
    """What workers have posted and the driver has not yet taken; what the driver commands."""

    def __init__(self, bad: dict[str, str]) -> None:
        self._messages, self._taken, self._takes = Messages(), Messages(), 0
        self._reason: InputError | None = None
        self._bad = dict(bad)
        self._running = False
        self._commands: list[Command] = []
        self._changed = asyncio.Condition()
        self._saved = asyncio.Event()

    async def give_up(self, reason: InputError) -> None:
        """Says that the run can't go on, however often the worker group is restarted."""
        self._reason = self._reason or reason

    async def reason_to_give_up(self) -> InputError | None:
        return self._reason

    async def begin(self, step: int, workers: int) -> int:
        """A worker group begins its steps; returns how many commands were given before."""
        if self._running:
            self._messages.notices.append(f"the workers were started again: {workers} go on from step {step}")
        self._running = True
        return len(self._commands)

    async def stop(self) -> bool:
        """Tells the workers to save and end; returns whether there are any."""
        await self._command(Command.STOP)
        return self._running

    async def save_now(self) -> None:
        """Tells the workers to save and go on; returns when the checkpoint is whole, or after a minute."""
        self._saved.clear()
        await self._command(Command.SAVE)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._saved.wait(), SAVE_SECONDS)

    async def saved(self) -> None:
        """Says that the workers have saved."""
        self._saved.set()

    async def next_command(self, seen: int) -> tuple[Command, int]:
        """Waits for a command after the first `seen`; a stop is for all groups to come, too."""
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
        """Says what the workers are at; see `Display.phase`."""
        self._messages.phase = what

    async def quarantine(self, bad: dict[str, str]) -> None:
        """Keeps the list of images that could not be decoded, and why; every epoch finds the same ones."""
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
        """What was posted since the take that the driver received last, and the number of this one.

        A driver that did not wait for an answer gets it again with the next one.
        """
        if received == self._takes:
            self._taken = Messages()
        self._taken.add(self._messages)
        self._messages = Messages()
        self._takes += 1
        return self._takes, self._taken


def read_quarantine(output: str) -> dict[str, str]:
    """The images that a run could not decode before it was resumed, and why."""
    uri = storage.join(output, QUARANTINE)
    lines = storage.read_bytes(uri).decode().splitlines() if storage.exists(uri) else []
    return {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}


def open_channel(bad: dict[str, str]) -> Any:
    """A channel on the driver's own node: it lives as long as the driver, whatever happens to other nodes.

    Args:
        bad: images that are known to be undecodable, and why.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return RunChannel.options(scheduling_strategy=here).remote(bad)  # type: ignore[attr-defined]


class PatientOnChannel:
    """`patiently`, on any process of a run: the user hears of a wait, and a wait in vain ends the run."""

    def __init__(self, channel: Any, seconds: float) -> None:
        self._channel, self._seconds = channel, seconds

    def __call__(self, do: Callable[[], T], what: str) -> T:
        try:
            return patiently(do, what, self._seconds, self._channel.notice.remote)
        except InputError as error:
            advice = "go on with --resume: what is written is whole"
            ray.get(self._channel.give_up.remote(type(error)(f"{error}; {advice}")))
            raise
