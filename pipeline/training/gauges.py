"""A run's metrics for Prometheus, exported through Ray's metrics; see k8s/monitoring."""

import time

from ray.util.metrics import Gauge

# Ray exports each with the prefix `ray_`. The first two are also curves in MLflow, named without `ddpm_`.
GAUGES = {
    "ddpm_images_per_second": "Images that all workers together train on in a second.",
    "ddpm_data_wait_share": "Share of their time that workers wait for images.",
    "ddpm_step": "The last logged step.",
    "ddpm_checkpoint_time_seconds": "Unix time of the newest checkpoint of this worker group, or of its start.",
}


class RunGauges:
    """The gauges of one run, set by rank 0.

    Args:
        run: id of the MLflow run; every gauge carries it as a tag.
    """

    def __init__(self, run: str) -> None:
        self._gauges = {name: Gauge(name, text, ("run",)) for name, text in GAUGES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})
        self.saved()

    def logged(self, step: int, point: dict[str, float]) -> None:
        """Sets the gauges to a point of the curves."""
        for name, value in {"step": step, **point}.items():
            if gauge := self._gauges.get(f"ddpm_{name}"):
                gauge.set(value)

    def saved(self) -> None:
        """Records the time at which a checkpoint was started."""
        self._gauges["ddpm_checkpoint_time_seconds"].set(time.time())
