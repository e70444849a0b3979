"""Spans of samples through workers: a pool of actors on Ray Data, or this process."""

from collections.abc import Iterator
from typing import Any, Protocol

import ray
import ray.data

from pipeline.errors import InputError
from pipeline.generation.config import GenerateConfig
from pipeline.generation.sampler import Setup

# Ray Data keeps some kilobytes in the driver for every task that there ever was: this bounds them.
MOST_TASKS = 4096

Row = dict[str, Any]


class Worker(Protocol):
    """Set up once, then called with rows."""

    def __init__(self, setup: Setup) -> None: ...
    def __call__(self, row: Row) -> Row: ...


class Pool(Protocol):
    """Gives rows to workers and yields the results as they come."""

    def __call__(self, worker: type[Worker], rows: list[Row], setup: Setup) -> Iterator[Row]: ...


def in_process(worker: type[Worker], rows: list[Row], setup: Setup) -> Iterator[Row]:
    """Does one row after the other, in this process."""
    yield from map(worker(setup), rows)


def actor_pool(worker: type[Worker], rows: list[Row], setup: Setup) -> Iterator[Row]:
    """Through a pool of actors. Ray Data restarts a killed actor, and gives its row to another one.

    Raises:
        InputError: no GPU where one is asked for, or what a worker raised as such.
    """
    config = setup.config
    least, most = pool_size(config, len(rows))
    done = ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_TASKS)).map(
        _Actor,
        # In a list, since Ray would put a bare reference's value into the actor's own arguments, which a restarted
        # actor can't find again.
        fn_constructor_args=(worker, [ray.put(setup)]),
        # Two in flight: the next row is there when one is done, and none waits long behind another at the end.
        compute=ray.data.ActorPoolStrategy(
            min_size=least, max_size=most, initial_size=most, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=1,
        num_gpus=1 if config.gpu else 0,
    )
    for row in done.iter_rows():
        if row.get("error"):
            raise InputError(row["error"])
        yield row


def pool_size(config: GenerateConfig, rows: int) -> tuple[int, int]:
    """Fewest and most actors for so many rows of work."""
    resources = ray.cluster_resources()
    if config.gpu and not resources.get("GPU"):
        raise InputError("--gpu: the cluster has no GPU")
    units = int(resources.get("GPU" if config.gpu else "CPU", 1))
    most = max(1, min(config.actors or config.max_actors or max(units, config.min_actors), rows))
    return most if config.actors else min(config.min_actors, most), most


class _Actor:
    """A worker whose errors, where the user can mend them, travel as results: Ray would bury them in tracebacks."""

    def __init__(self, worker: type[Worker], setup: list[Any]) -> None:
        self._error = ""
        try:
            self._do = worker(ray.get(setup[0]))
        except InputError as error:
            self._error = str(error)

    def __call__(self, row: Row) -> Row:
        try:
            return self._do(row) if not self._error else {"error": self._error}
        except InputError as error:
            return {"error": str(error)}
