"""Runs tasks in workers that are set up once: a pool of actors on Ray Data, or this process.

Ray is imported only when a pool of actors starts, because jobs on little data do not need it.
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

# Most blocks of a dataset. Ray Data keeps some kilobytes in the driver for every block.
MOST_BLOCKS = 4096
# Most executions in a row that may fail because a node died, without any task done.
MOST_FAILURES = 3


class Work(Protocol):
    """The work on a task. The job sends it to its workers by pickle."""

    def start(self, device: str) -> Callable[[Any], Any]:
        """Sets up once on a device ("cpu" or "cuda"), and returns the function that does one task."""


class Pool(Protocol):
    """Does all tasks and yields their results."""

    def __call__(self, work: Work, tasks: Sequence[Any], title: str = "") -> Iterator[Any]: ...


def in_process(work: Work, tasks: Sequence[Any], title: str = "") -> Iterator[Any]:
    """Does the tasks one after the other in this process, on the CPU."""
    yield from map(work.start("cpu"), tasks)


@dataclass(frozen=True)
class ActorPool:
    """A `Pool` over the cluster. It joins or starts Ray if the process has not done so.

    Attributes:
        most: most actors, never more than tasks; 0 = one per CPU (per GPU if they use GPUs), with those that an
            autoscaler can add.
        gpu: True gives each actor a GPU; None = if the cluster has one or its autoscaler can add one.
        least: fewest actors; the pool grows while tasks wait and the cluster has room, and shrinks when tasks run out.
            0 = always as many as `most`.
        cpus: CPUs that each actor reserves; a fraction fits beside the processes that hold a small machine's CPUs.
        ordered: True yields results in the order of the tasks, so that merged results are the same for any pool;
            False yields them as they are done.
        job: name of the job, which begins the lines of the progress display.
    """

    most: int = 0
    gpu: bool | None = None
    least: int = 0
    cpus: float = 0.5
    ordered: bool = True
    job: str = ""

    def __call__(self, work: Work, tasks: Sequence[Any], title: str = "") -> Iterator[Any]:
        """Does the tasks as soon as an actor fits. A killed actor is restarted, and its task repeated.

        Args:
            title: title of the progress display; "" = no display.

        Raises:
            InputError: no node is large enough for an actor, or the work itself raised it.
        """
        import ray

        from pipeline.cluster.room import announced, choose_gpu

        if not ray.is_initialized():
            connect_now()
        full = f"{self.job}: {title}" if self.job else title
        with Display(full, len(tasks), "tasks") if title else contextlib.nullcontext() as display:
            say = display.note if display else partial(print, file=sys.stderr, flush=True)
            gpu = choose_gpu(self.gpu, self._need, say)
            with announced(self._need(gpu), say):
                for done, row in enumerate(self._rows(work, tasks, gpu), start=1):
                    if row["error"]:
                        raise pickle.loads(row["error"])
                    if display:
                        display.update(done, "")
                    yield pickle.loads(row["result"])

    def _need(self, gpu: bool) -> "Need":
        """The resources of one actor."""
        from pipeline.cluster.room import Need

        each = {"CPU": self.cpus} | ({"GPU": 1.0} if gpu else {})
        return Need(
            1, each, f"MapWorker(Map({_Actor.__name__}))", "--gpu" if gpu else "one process of this job"
        )

    def _rows(self, work: Work, tasks: Sequence[Any], gpu: bool) -> Iterator[dict[str, Any]]:
        """Does the tasks in one execution of Ray Data, or in several if executions fail because a node died.

        Ray Data has one actor in a cluster that knows where all others are. It only runs on the node of its first user.
        If that node dies, all running executions fail. An execution that starts later makes a new such actor.
        """
        import ray

        left, failed = dict.fromkeys(range(len(tasks))), 0
        # In a list, because Ray would replace a bare reference by its value, which a restarted actor can't find.
        shared = [ray.put((work, tasks))]
        while left:
            try:
                for row in self._dataset(shared, list(left), gpu).iter_rows():
                    del left[row["id"]]
                    failed = 0
                    yield row
            except ray.exceptions.ActorUnschedulableError:
                failed += 1
                if failed > MOST_FAILURES:
                    raise

    def _dataset(self, shared: list[Any], numbers: list[int], gpu: bool) -> Any:
        """The dataset of the results of some tasks.

        Args:
            shared: reference to the work and all tasks.
            numbers: places of the tasks in the list of all tasks.
        """
        import ray.data

        from pipeline.cluster.room import Need, most_places

        wanted = min(self.most or len(numbers), len(numbers))
        each = self._need(gpu) if gpu else Need(1, {"CPU": 1.0}, "", "")
        units = wanted if self.most and not self.least else most_places(each, wanted)
        least, most = self.size(units, len(numbers))
        # Not `ray.data.range`: each of its tasks needs a whole CPU, and the actors may leave none.
        rows = [{"id": number} for number in numbers]
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS)).map(
            _Actor,
            fn_constructor_args=(shared, "cuda" if gpu else "cpu"),
            # Two tasks in flight, so the next one is ready when one is done, and none waits long at the end.
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
        return dataset

    def size(self, units: int, tasks: int) -> tuple[int, int]:
        """The fewest and the most actors.

        Args:
            units: number of CPUs or GPUs.
            tasks: number of tasks.
        """
        most = max(1, min(self.most or max(units, self.least), tasks))
        return min(self.least or most, most), most


class _Actor:
    """A worker that returns an InputError as a result, because Ray would bury it in tracebacks."""

    def __init__(self, setup: list[Any], device: str) -> None:
        import ray

        self._error = b""
        try:
            work, self._tasks = ray.get(setup[0])
            # One thread, so that sums are the same on any machine and with any number of actors.
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(1)
            use_tf32(False)  # TF32 would round the products of figures and samples in fp32
            self._do = work.start(device)
        except InputError as error:
            self._error = pickle.dumps(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            result = b"" if self._error else pickle.dumps(self._do(self._tasks[row["id"]]))
            return row | {"result": result, "error": self._error}
        except InputError as error:
            return row | {"result": b"", "error": pickle.dumps(error)}
