"""Tasks through workers that are set up once: a pool of actors on Ray Data, or this process.

Ray is imported when a pool of actors starts: jobs on little data never need it.
"""

import contextlib
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.cluster.session import connect_now
from pipeline.display import Display
from pipeline.errors import InputError
from pipeline.gpu.precision import use_tf32

if TYPE_CHECKING:
    from pipeline.cluster.room import Need

# Ray Data keeps some kilobytes in the driver for every block that there ever was: this bounds them.
MOST_BLOCKS = 4096


class Work(Protocol):
    """What to do with a task; travels to whoever does it by pickle, within the job."""

    def start(self, device: str) -> Callable[[Any], Any]:
        """Sets up on a device ("cpu", "cuda"), once, and returns the function that does one task."""


class Pool(Protocol):
    """Does all tasks and yields their results."""

    def __call__(self, work: Work, tasks: Sequence[Any], title: str = "") -> Iterator[Any]: ...


def in_process(work: Work, tasks: Sequence[Any], title: str = "") -> Iterator[Any]:
    """Does the tasks one after the other in this process, on the CPU."""
    yield from map(work.start("cpu"), tasks)


@dataclass(frozen=True)
class ActorPool:
    """A `Pool` over the cluster, which is joined or started where there is none yet.

    Attributes:
        most: most actors, never more than tasks; 0 = one for every CPU (GPU where those are used), those included that
            an autoscaler adds.
        gpu: a GPU for each actor; None = where the cluster has any, or its autoscaler brings one.
        least: fewest actors: the pool grows while tasks wait and the cluster has room, and shrinks when they run
            out; 0 = as many as `most`, all the time.
        cpus: of each actor; fractions run beside whatever holds the CPUs of a small machine.
        ordered: results come in the tasks' order, so that what is merged of them is the same for any pool; else as
            they are done.
    """

    most: int = 0
    gpu: bool | None = None
    least: int = 0
    cpus: float = 0.5
    ordered: bool = True

    def __call__(self, work: Work, tasks: Sequence[Any], title: str = "") -> Iterator[Any]:
        """Does the tasks, once there is room for an actor. Ray Data restarts a killed one, and gives its task again.

        Args:
            title: shown beside the number of tasks done; "" = nothing is shown.

        Raises:
            InputError: no node is large enough for an actor, or what the work raised as such.
        """
        import ray

        from pipeline.cluster.room import announced, choose_gpu

        if not ray.is_initialized():
            connect_now()
        with Display(title, len(tasks), "tasks") if title else contextlib.nullcontext() as display:
            say = display.note if display else partial(print, file=sys.stderr, flush=True)
            gpu = choose_gpu(self.gpu, self._need, say)
            with announced(self._need(gpu), say):
                for done, row in enumerate(self._rows(work, tasks, gpu), start=1):
                    if row["error"]:
                        raise InputError(row["error"])
                    if display:
                        display.update(done, "")
                    yield pickle.loads(row["result"])

    def _need(self, gpu: bool) -> "Need":
        """Of one actor."""
        from pipeline.cluster.room import Need

        each = {"CPU": self.cpus} | ({"GPU": 1.0} if gpu else {})
        return Need(
            1, each, f"MapWorker(Map({_Actor.__name__}))", "--gpu" if gpu else "one process of this job"
        )

    def _rows(self, work: Work, tasks: Sequence[Any], gpu: bool) -> Iterator[dict[str, Any]]:
        import ray.data

        from pipeline.cluster.room import Need, most_places

        wanted = min(self.most or len(tasks), len(tasks))
        each = self._need(gpu) if gpu else Need(1, {"CPU": 1.0}, "", "")
        units = wanted if self.most and not self.least else most_places(each, wanted)
        least, most = self.size(units, len(tasks))
        # Items, not `ray.data.range`: its own tasks take a whole CPU each, which the actors may have left none of.
        numbers = [{"id": number} for number in range(len(tasks))]
        dataset = ray.data.from_items(numbers, override_num_blocks=min(len(tasks), MOST_BLOCKS)).map(
            _Actor,
            # In a list, since Ray would put a bare reference's value into the actor's own arguments, which a restarted
            # actor can't find again.
            fn_constructor_args=([ray.put((work, tasks))], "cuda" if gpu else "cpu"),
            # Two in flight: the next task is there when one is done, and none waits long behind another at the end.
            compute=ray.data.ActorPoolStrategy(
                min_size=least,
                max_size=most,
                initial_size=max(least, min(units, most)),
                max_tasks_in_flight_per_actor=2,
            ),
            num_cpus=self.cpus,
            num_gpus=1 if gpu else 0,
        )
        dataset.context.execution_options.preserve_order = self.ordered
        yield from dataset.iter_rows()

    def size(self, units: int, tasks: int) -> tuple[int, int]:
        """Fewest and most actors for so many CPUs or GPUs, and tasks."""
        most = max(1, min(self.most or max(units, self.least), tasks))
        return min(self.least or most, most), most


class _Actor:
    """A worker whose errors, where the user can mend them, travel as results: Ray would bury them in tracebacks."""

    def __init__(self, setup: list[Any], device: str) -> None:
        import ray

        self._error = ""
        try:
            work, self._tasks = ray.get(setup[0])
            # One thread, whatever the number of actors and the machine: sums come out the same.
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(1)
            use_tf32(False)  # figures and samples of fp32 are those of fp32
            self._do = work.start(device)
        except InputError as error:
            self._error = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            result = b"" if self._error else pickle.dumps(self._do(self._tasks[row["id"]]))
            return {"result": result, "error": self._error}
        except InputError as error:
            return {"result": b"", "error": str(error)}
