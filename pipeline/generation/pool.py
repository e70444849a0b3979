"""Spans of samples through a pool of actors, on Ray Data."""

from collections.abc import Iterator
from typing import Any

import ray
import ray.data

from pipeline.errors import InputError
from pipeline.generation.config import GenerateConfig
from pipeline.generation.sampler import Setup

# Ray Data keeps some kilobytes in the driver for every task that there ever was: this bounds them.
MOST_TASKS = 4096


def run(
    actor: type, rows: list[dict[str, Any]], setup: Setup, config: GenerateConfig
) -> Iterator[dict[str, Any]]:
    """Gives each row to an actor and yields the results as they come.

    Ray Data restarts a killed actor, and gives its row to another one.

    Raises:
        InputError: no GPU where one is asked for, or the error that a result names.
    """
    resources = ray.cluster_resources()
    if config.gpu and not resources.get("GPU"):
        raise InputError("--gpu: the cluster has no GPU")
    units = int(resources.get("GPU" if config.gpu else "CPU", 1))
    most = max(1, min(config.actors or config.max_actors or max(units, config.min_actors), len(rows)))
    least = most if config.actors else min(config.min_actors, most)
    done = ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_TASKS)).map(
        actor,
        fn_constructor_args=([ray.put(setup)],),
        # Two in flight: the next span is there when one is done, and none waits long behind another at the end.
        compute=ray.data.ActorPoolStrategy(
            min_size=least, max_size=most, initial_size=most, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=1,
        num_gpus=1 if config.gpu else 0,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise InputError(row["error"])
        yield row
