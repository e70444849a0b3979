"""Validation during training: held-out bits/dim, samples and their figures, from a checkpoint's averaged weights.

Ray Train runs it as a separate task, one at a time, for checkpoints that are reported with `validation`. The steps do
not wait for it. The held-out images, the terms of the bound and all noise are the same for every checkpoint.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from pipeline import storage
from pipeline.cluster.pool import Work
from pipeline.config import ModelSpec, TrainConfig
from pipeline.data.index import DatasetIndex
from pipeline.errors import InputError
from pipeline.evaluation.bits import held_out_bits
from pipeline.evaluation.config import BITS_PER_DIM
from pipeline.evaluation.work import choose
from pipeline.gpu.precision import use_tf32
from pipeline.models.export import CONFIG, save_model
from pipeline.models.unet import UNet, build
from pipeline.rng import Choice
from pipeline.training import checkpoint
from pipeline.training.checkpoint_manager import CHECKPOINTS

BEST = "best"


@dataclass(frozen=True)
class SpareResources(Mapping[str, Any]):
    """Resources of a validation's task: what the workers leave free. Ray Train reads them when it starts the task.

    A task reserves no CPU or GPU if the workers leave none or others hold it, so that a validation never waits for them.

    Args:
        gpu: True if the workers use GPUs.
    """

    config: TrainConfig
    gpu: bool

    def __getitem__(self, name: str) -> Any:
        if name == "num_cpus":
            return self._spare("CPU", self.config.cpus_per_worker)
        if name == "num_gpus":
            return self._spare("GPU", self.config.gpus_per_worker) if self.gpu else 0
        # Its own environment gives it its own processes, so no other task inherits their low priority.
        return {"env_vars": {"OMP_NUM_THREADS": "1"}}

    def __iter__(self) -> Iterator[str]:
        return iter(("num_cpus", "num_gpus", "runtime_env"))

    def __len__(self) -> int:
        return len(list(self))

    def _spare(self, name: str, each: float) -> int:
        left = ray.cluster_resources().get(name, 0) - self.config.workers * each
        return int(min(left, ray.available_resources().get(name, 0)) >= 1)


@dataclass(frozen=True)
class Validator:
    """The function that Ray Train calls with a checkpoint.

    Args:
        held_out: images to validate on.
        output: URI of the run.
        channel: handle of the run's `RunChannel`.
        train: training images, only if figures of samples are measured, since a large dataset's index takes long to
            send.
    """

    config: TrainConfig
    spec: ModelSpec
    held_out: DatasetIndex
    output: str
    channel: Any
    train: DatasetIndex | None = None

    def __call__(self, reported: ray.train.Checkpoint, *, step: int) -> dict[str, Any]:
        """Posts the figures and a grid of samples, and keeps the best model in `OUTPUT/best`.

        Returns:
            figures by name.
        """
        try:
            return self._validate(storage.name(reported.path), step)
        except Exception as error:  # Ray Train continues, and reports the error only in its own logs
            self.channel.notice.remote(f"step {step} could not be validated: {type(error).__name__}: {error}")
            raise

    def _validate(self, name: str, step: int) -> dict[str, Any]:
        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        if device.type == "cpu":  # only CPU time that the training leaves
            os.setpriority(os.PRIO_PROCESS, 0, 19)
            torch.set_num_threads(1)
        use_tf32(False)
        model = build(self.spec)
        weights, _ = checkpoint.read_model(storage.join(self.output, CHECKPOINTS, name))
        model.load_state_dict(weights)
        model = model.eval().requires_grad_(False)
        config = self.config

        def here(work: Work, tasks: Sequence[Any], title: str = "") -> Iterator[Any]:
            return map(work.start(str(device)), tasks)

        bits = held_out_bits(
            model,
            self.spec,
            self.held_out,
            choose(self.held_out.rows, config.validation_images, config.seed, Choice.BOUND),
            terms=min(config.validation_terms, self.spec.diffusion.timesteps),
            seed=config.seed,
            pool=here,
        )
        if not math.isfinite(bits.bits_per_dim):
            raise InputError(f"its bits/dim are {bits.bits_per_dim}")
        figures = {BITS_PER_DIM: bits.bits_per_dim, f"{BITS_PER_DIM}_stderr": bits.stderr}
        model = model.to(device)
        if self.train:
            # Imported here, because the driver imports this module too and does not need it.
            from pipeline.training.sample_figures import sample_figures

            try:
                figures |= sample_figures(
                    config, self.spec, (self.train, self.held_out), self.output, model, here
                )
            except InputError as error:  # the bound is valid without them
                self.channel.notice.remote(f"step {step}: no figures of samples: {error}")
        self._post(model, step, figures)
        self._keep_best(weights, step, bits.bits_per_dim)
        return figures

    def _post(self, model: UNet, step: int, figures: dict[str, float]) -> None:
        # Imported here, because the driver imports this module too and draws nothing.
        from pipeline.pictures.make import draw_samples

        with tempfile.TemporaryDirectory() as folder:
            picture = draw_samples(model, self.spec, Path(folder) / "grid.png", rows=4, seed=self.config.seed)
            path = f"samples/step-{step:09d}.png"
            self.channel.post_file.remote(path, picture.read_bytes())
        ray.get(self.channel.post_points.remote([(int(time.time() * 1000), step, figures)]))

    def _keep_best(self, weights: dict[str, torch.Tensor], step: int, bits: float) -> None:
        place = storage.join(self.output, BEST)
        note = storage.join(place, CONFIG)
        if storage.exists(note) and json.loads(storage.read_bytes(note))["provenance"][BITS_PER_DIM] <= bits:
            return
        facts = {**self.spec.provenance, "steps": step, BITS_PER_DIM: bits}
        save_model(place, weights, replace(self.spec, provenance=facts))
