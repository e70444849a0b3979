"""What a run says of itself: averages over a logging interval, and a record of the samples that it has seen.

Both are carried by checkpoints, so that a curve's point and the record are those of a run that nothing stopped.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.errors import InputError
from pipeline.training.flops import utilisation
from pipeline.training.step import Outcome

IMAGES_BEFORE_JUDGING = 100


def samples_digest(epochs: np.ndarray, ids: np.ndarray) -> int:
    """A number for a multiset of (epoch, sample id) pairs: equal for equal multisets, whatever their order.

    The sum, modulo 2^64, of a hash of each pair (the finalizer of SplitMix64: Steele et al. 2014): a pair that is
    missing, or there twice, changes it, but for a chance of 2^-64. Sums of parts are the whole's.
    """
    z = ids.astype(np.uint64) + (epochs.astype(np.uint64) << np.uint64(40))
    z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((z ^ (z >> np.uint64(31))).sum(dtype=np.uint64))


class Meter:
    """Sums of this worker since the last logged point, and of the samples seen since the run's first step."""

    def __init__(
        self,
        config: TrainConfig,
        world_size: int,
        device: torch.device,
        peak_flops: float = 0.0,
    ) -> None:
        """
        Args:
            peak_flops: what this worker could do a second; 0 leaves the model FLOPs utilisation out.
        """
        self._config, self.world_size, self.device, self._peak_flops = config, world_size, device, peak_flops
        # Of a training step. Only the worker that posts the curve is told it.
        self.flops_per_image: Callable[[], int] = lambda: 0
        utilisation(device)
        self._named: list[str] = []
        # [samples, their digest, undecodable ones], since the run's first step, int64 (the digest wraps around).
        self._seen = np.zeros(3, np.int64)
        # Steps up to the last one that was looked at, alike on all workers.
        self.skipped_in_a_row = 0
        self._new_interval()

    def _new_interval(self) -> None:
        # Of the loss, of the gradient norm, and of the steps made. They stay on the device, so that it waits for nothing.
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._steps, self._bad = 0, 0  # steps made and skipped, undecodable images
        self._here, self._waited, self._began = 0, 0.0, time.perf_counter()

    def add(self, outcome: Outcome, waited: float) -> None:
        """Counts a step."""
        self._sums += torch.stack([outcome.loss.double(), outcome.norm.double(), outcome.finite.double()])
        self._steps += 1
        batch = outcome.batch
        self._here += 1
        self._waited += waited
        digest = np.uint64(samples_digest(batch.epochs.numpy(), batch.ids.numpy())).astype(np.int64)
        self._seen += np.array([len(batch.ids), digest, len(batch.bad)])
        self._bad += len(batch.bad)
        self._named = (self._named + [f"{path} ({reason})" for path, reason in batch.bad.items()])[:5]
        self._judge(self._seen[0], self._seen[2])

    def _judge(self, seen: float, bad: float) -> None:
        """Stops the run where more images are bad than it allows, beyond chance.

        Every worker is judged at every step, so thousands of times in a run. At the allowed share the number of bad
        images is a Poisson number; five standard deviations above its mean are still taken for chance.
        """
        allowed = self._config.max_bad_fraction * seen
        if seen >= IMAGES_BEFORE_JUDGING and bad > allowed + 5 * math.sqrt(allowed):
            raise InputError(
                f"{bad:.0f} of {seen:.0f} images could not be decoded, more than --max-bad-fraction "
                f"{self._config.max_bad_fraction:g} allows: {'; '.join(self._named) or 'see the quarantine list'}"
            )

    def read(self, rate: float) -> dict[str, float]:
        """The interval's averages over all workers; a new interval begins. A collective call.

        Raises:
            InputError: too many images of all workers' could not be decoded.
        """
        seconds = time.perf_counter() - self._began
        system = utilisation(self.device)
        _, norm, made = self._sums.tolist()
        loss, waited, bad, peak, all_seen, all_bad, *means = self._total(
            self._sums[0], self._waited, self._bad, self._peak_flops, *self._seen[[0, 2]], *system.values()
        )
        self._judge(all_seen, all_bad)
        rate_of_images = self._here * self._config.batch_size / seconds
        result = {
            "loss": loss / max(made, 1),
            "gradient_norm": norm / max(made, 1),
            "learning_rate": rate,
            "images_per_second": rate_of_images,
            "data_wait_share": waited / self.world_size / seconds,
            "undecodable_images": bad,
            "skipped_steps": self._steps - made,
            **{name: mean / self.world_size for name, mean in zip(system, means, strict=True)},
        }
        if peak:
            result["mfu"] = rate_of_images * self.flops_per_image() / peak
        self._new_interval()
        return result

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: the sums over all workers. A collective call."""
        loss, bad = self._total(self._sums[0], self._bad)
        _, norm, made = self._sums.tolist()
        seen = torch.from_numpy(self._seen.copy()).to(self.device)
        if self.world_size > 1:
            dist.all_reduce(seen)
        samples, digest, undecodable = seen.tolist()
        return {
            "interval": {
                "loss": loss,
                "norm": norm,
                "steps": int(made),
                "skipped": self._steps - int(made),
                "bad": bad,
            },
            "skipped_in_a_row": self.skipped_in_a_row,
            "seen": {
                "samples": samples,
                "digest": f"{digest % 2**64:016x}",
                "undecodable": undecodable,
            },
        }

    def restore(self, state: dict[str, Any], rank: int) -> None:
        """Goes on from `state`, whose sums over all workers become those of rank 0."""
        interval, seen = state["interval"], state["seen"]
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)  # 0.1.0 did not count them
        self._steps = interval["steps"] + interval["skipped"]
        loss = interval["loss"] if rank == 0 else 0.0
        self._sums += torch.tensor([loss, interval["norm"], interval["steps"]], dtype=torch.float64).to(
            self._sums
        )
        if rank == 0:
            self._bad = int(interval["bad"])
            digest = np.uint64(int(seen["digest"], 16)).astype(np.int64)
            self._seen = np.array([seen["samples"], digest, seen["undecodable"]], np.int64)

    def _total(self, *values: Tensor | float) -> list[float]:
        """Each value summed over the workers."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()
