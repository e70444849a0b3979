"""Measures images/s of two workers with one thread each, divided by those of one worker with one thread.

    python -m benchmarks.scaling [--smoke]

Both runs are whole pipelines (Ray Data, Ray Train, MLflow) in one Ray, with the same global batch. `ratio_of_bare_steps`
is the machine's own limit: bare steps in two processes at once, with half a batch each, divided by those in one process.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.common import on_disk, pipeline_rate, two_over_one
from pipeline.cluster.session import connect
from pipeline.commands import cli
from pipeline.config import ImageConfig, ModelConfig, TrainConfig
from pipeline.tracking import address


def bare_rate(config: TrainConfig, image: ImageConfig, steps: int) -> float:
    """Images/s of bare training steps."""
    from benchmarks.pipeline_overhead import bare
    from pipeline.config import DiffusionConfig, ModelSpec

    return bare(config, ModelSpec(config.model, image, DiffusionConfig()), steps)


def main(smoke: bool, folder: Path) -> dict[str, object]:
    """Runs all measurements. Returns the result that is printed."""
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

    connect(environment=address.environment(), preload="pipeline.training.worker")
    on_disk(folder, 64 if smoke else 640, image)
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
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="run only a few steps of a small network")
    options = parser.parse_args()
    with cli.result_stream() as stream, tempfile.TemporaryDirectory() as temporary:
        address.quieten()
        os.chdir(temporary)
        result = main(options.smoke, Path(temporary))
        print(json.dumps(result), file=stream, flush=True)
        os.chdir("/")
