"""Two workers of one thread over one worker of one thread; and where the seconds before the first step go.

    python -m benchmarks.scaling [--smoke]

Both runs are whole pipelines (Ray Data, Ray Train, MLflow) in one Ray, with the same global batch. The machine's
own limit stands beside their ratio: bare steps in two processes at once, on half a batch each, over those in one. The
start-up is that of the first run, in this process: from its start to the end of the first optimizer step.
"""

import time

BEGAN = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import tempfile  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from pipeline.cluster.session import connect  # noqa: E402
from pipeline.commands import cli  # noqa: E402
from pipeline.config import ImageConfig, ModelConfig, TrainConfig  # noqa: E402
from pipeline.tracking import address, runs  # noqa: E402


class Clock:
    """Seconds between calls, by name."""

    def __init__(self, began: float) -> None:
        self._last = began
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, until: float = 0.0) -> None:
        now = until or time.time()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def start_up(config: TrainConfig, clock: Clock) -> None:
    """Trains one step, telling `clock` of every part on the way."""
    from pipeline.training import trainer

    clock("imports")
    trainer.check(config)
    clock("checks of data and settings")
    opened = trainer.open_run
    reported: list[float] = []

    def open_run(*arguments: Any) -> Any:
        clock("driver")
        run = opened(*arguments)
        clock("MLflow")
        return run

    def deliver(run: runs.Run, points: list[tuple[int, int, dict[str, float]]]) -> None:
        if not reported:
            at, _, values = points[0]
            reported.extend(
                [at / 1000, values["data_wait_share"], config.batch_size / values["images_per_second"]]
            )

    trainer.open_run = open_run
    log_points, runs.log_points = runs.log_points, deliver
    trainer.train(config)
    trainer.open_run, runs.log_points = opened, log_points
    ended, share, seconds = reported
    clock("Ray Train: controller, worker, its imports, the model", ended - seconds)
    clock("Ray Data: first batch", ended - seconds + share * seconds)
    clock("first step", ended)


def bare_rate(config: TrainConfig, image: ImageConfig, steps: int) -> float:
    """Images/s of the step alone."""
    from benchmarks.pipeline_overhead import bare
    from pipeline.config import DiffusionConfig, ModelSpec

    seconds = bare(config, ModelSpec(config.model, image, DiffusionConfig()), steps)
    return config.batch_size * len(seconds) / sum(seconds)


def main(smoke: bool, folder: Path) -> dict[str, object]:
    """Runs all; returns what is printed."""
    image = ImageConfig(8 if smoke else 32, 3)
    model = ModelConfig(32, (1, 2), res_blocks=1, attention_resolutions=()) if smoke else ModelConfig()

    def settings(workers: int, steps: int, log_every: int) -> TrainConfig:
        return TrainConfig(
            data=str(folder / "data"),
            output=str(folder / f"run-{workers}-{steps}"),
            steps=steps,
            workers=workers,
            batch_size=8 if smoke else 32,
            model=model,
            log_every=log_every,
            experiment="scaling",
        )

    clock = Clock(BEGAN)
    clock("imports")
    connect(environment=address.environment(), preload="pipeline.training.worker")
    clock("Ray")
    from benchmarks.common import on_disk, pipeline_rate, two_over_one

    clock("imports")
    on_disk(folder, 64 if smoke else 640, image)
    clock("(making the data)")
    start_up(settings(1, 1, 1), clock)
    del clock.seconds["(making the data)"]
    steps, every = (4, 2) if smoke else (9, 3)
    one, _ = pipeline_rate(settings(1, steps, every))
    two, points = pipeline_rate(settings(2, steps, every))
    whole = settings(1, steps, every)
    half = replace(whole, batch_size=whole.batch_size // 2)
    limit = two_over_one(bare_rate, (whole, image, steps), (half, image, steps))
    return {
        "one_worker_images_per_second": round(one, 2),
        "two_workers_images_per_second": round(two, 2),
        "two_workers_data_wait_share": round(
            max(p["data_wait_share"] for s, p in points.items() if s > every), 4
        ),
        "ratio": round(two / one, 3),
        "ratio_of_bare_steps": round(limit, 3),
        "start_up_seconds": {name: round(seconds, 1) for name, seconds in clock.seconds.items()},
        "start_up_seconds_in_all": round(sum(clock.seconds.values()), 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a small network and few steps: does it run?")
    options = parser.parse_args()
    with cli.result_stream() as stream, tempfile.TemporaryDirectory() as temporary:
        address.quieten()
        os.chdir(temporary)
        result = main(options.smoke, Path(temporary))
        print(json.dumps(result), file=stream, flush=True)
        os.chdir("/")
