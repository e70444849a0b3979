"""A run's figures: averages over a logging interval, and a record of the samples seen.

Checkpoints carry both, so an interrupted run has the same curves and the same record as an undisturbed one.
"""

import math
import time
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
    """A digest of a multiset of (epoch, sample id) pairs that does not depend on their order.

    It is the sum modulo 2^64 of a hash of each pair (the finalizer of SplitMix64, Steele et al. 2014). A missing or
    repeated pair changes it, except with a probability of 2^-64. The digests of parts add up to that of the whole.

    Args:
        epochs: epoch of each pair, int64 [N].
        ids: sample id of each pair, int64 [N].
    """
    z = ids.astype(np.uint64) + (epochs.astype(np.uint64) << np.uint64(40))
    z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((z ^ (z >> np.uint64(31))).sum(dtype=np.uint64))


class Meter:
    """This worker's sums since the last logged point, and its record of the samples since the run's first step."""

    def __init__(
        self,
        config: TrainConfig,
        world_size: int,
        device: torch.device,
        flops_per_image: int = 0,
        peak_flops: float = 0.0,
    ) -> None:
        """
        Args:
            flops_per_image: FLOPs of one image in a training step.
            peak_flops: FLOP/s that this worker's device can reach; 0 leaves out the model FLOPs utilisation (`mfu`).
        """
        self._config, self.world_size, self.device = config, world_size, device
        self._flops_per_image, self._peak_flops = flops_per_image, peak_flops
        utilisation(device)
        self._named: list[str] = []
        # Samples, their digest and undecodable samples since the run's first step; int64, so the digest wraps around.
        self._seen = np.zeros(3, np.int64)
        # Skipped steps in a row, up to the last step that was checked; equal on all workers.
        self.skipped_in_a_row = 0
        self._new_interval()

    def _new_interval(self) -> None:
        # Sums of the loss, of the gradient norm and of the finite steps. On the device, so that a step never waits.
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._steps, self._bad = 0, 0  # all steps, skipped ones included; undecodable images
        self._here, self._waited, self._began = 0, 0.0, time.perf_counter()

    def add(self, outcome: Outcome, waited: float) -> None:
        """Counts a step.

        Args:
            waited: seconds that the step waited for its batch.

        Raises:
            InputError: too many of this worker's images could not be decoded.
        """
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
        """Stops the run if significantly more images are undecodable than `max_bad_fraction` allows.

        Every worker checks this at every step, thousands of times in a run. At the allowed share the number of bad
        images follows a Poisson distribution, so up to five standard deviations above its mean count as chance.
        """
        allowed = self._config.max_bad_fraction * seen
        if seen >= IMAGES_BEFORE_JUDGING and bad > allowed + 5 * math.sqrt(allowed):
            raise InputError(
                f"{bad:.0f} of {seen:.0f} images could not be decoded, more than --max-bad-fraction "
                f"{self._config.max_bad_fraction:g} allows: {'; '.join(self._named) or 'see the quarantine list'}"
            )

    def read(self, rate: float) -> dict[str, float]:
        """Returns the interval's averages over all workers, and begins a new interval. A collective call.

        Args:
            rate: learning rate of the last step.

        Raises:
            InputError: too many images of all workers could not be decoded.
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
            result["mfu"] = rate_of_images * self._flops_per_image / peak
        self._new_interval()
        return result

    def state(self) -> dict[str, Any]:
        """The sums over all workers, as JSON for a checkpoint. A collective call."""
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
        """Continues from the `state` of a checkpoint. Rank 0 takes over the sums of all workers."""
        interval, seen = state["interval"], state["seen"]
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)  # release 0.1.0 did not count them
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
        """Sums each value over the workers. A collective call."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()
