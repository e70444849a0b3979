"""Runs work over the cluster: Ray Data hands tasks to a pool of actors that hold the network."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy
from rich.console import Console
from rich.progress import track
from safetensors.numpy import load, save

from pipeline.errors import InputError
from pipeline.evaluation.work import Partial, Work

# Fractions let the pool run beside whatever holds the CPUs of a small machine.
CPUS_PER_ACTOR = 0.5


@dataclass(frozen=True)
class ActorPool:
    """A `work.Pool` over Ray.

    Attributes:
        actors: how many; 0 = one per CPU of the cluster (per GPU where those are used), never more than tasks.
        gpu: one GPU per actor; None = where the cluster has any.
    """

    actors: int = 0
    gpu: bool | None = None

    def __call__(self, work: Work, tasks: Sequence[np.ndarray], title: str = "") -> Iterator[Partial]:
        """Does the tasks; their partial results come in order, whoever did them, and again if an actor dies.

        Raises:
            InputError: what a task raised as such.
        """
        if not ray.is_initialized():
            ray.init()
        resources = ray.cluster_resources()
        gpu = resources.get("GPU", 0) >= 1 if self.gpu is None else self.gpu
        if gpu and not resources.get("GPU"):
            raise InputError("--gpu: the cluster has no GPU")
        units = self.actors or int(resources.get("GPU" if gpu else "CPU", 1))
        dataset = ray.data.from_items(
            [{"ids": ids.astype(np.int64).tobytes()} for ids in tasks], override_num_blocks=len(tasks)
        ).map(
            _Actor,
            fn_constructor_args=(work, "cuda" if gpu else "cpu"),
            compute=ActorPoolStrategy(size=max(1, min(units, len(tasks)))),
            num_cpus=CPUS_PER_ACTOR,
            num_gpus=1 if gpu else 0,
        )
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        rows = track(
            dataset.iter_rows(),
            description=title,
            total=len(tasks),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        for row in rows:
            if row["error"]:
                raise InputError(row["error"])
            yield load(row["result"])


class _Actor:
    """Holds the network and does one task at a time."""

    def __init__(self, work: Work, device: str) -> None:
        # One thread, whatever the number of actors: sums come out the same.
        torch.set_num_threads(1)
        self._do = work.start(torch.device(device))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": save(self._do(np.frombuffer(row["ids"], np.int64).copy())), "error": ""}
        except InputError as error:
            return {"result": b"", "error": str(error)}
