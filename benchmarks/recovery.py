"""From SIGKILL of one of two training workers to the next step that was not made before, and the steps lost.

    python -m benchmarks.recovery [--smoke]

On a local Ray of its own, with handwritten digits. Prints one JSON line; the seconds are the medians of the kills:
until the run's curve grows past the step at which the worker died. In terms of steps: how many of those that were
made are made again, beside the most that a checkpoint interval allows.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
CHECKPOINT_EVERY = 10


def training_workers(job: int) -> list[int]:
    """The processes of Ray Train's workers below a job."""
    found = []
    for process in psutil.Process(job).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def main(smoke: bool) -> None:
    kills = 1 if smoke else 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the job below is ended in any case
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        environment.pop("RAY_ADDRESS", None)
        prepare = [sys.executable, str(ROOT / "jobs/prepare.py"), "--output", "digits"]
        subprocess.run(prepare, check=True, env=environment, capture_output=True)
        reader, writer = os.pipe()
        worker = subprocess.Popen(
            [sys.executable, __file__, "--driver", str(writer)],
            env=environment | {"PYTHONPATH": str(ROOT)},
            pass_fds=[writer],
            stdout=subprocess.DEVNULL,
        )
        os.close(writer)
        try:
            print(json.dumps(measure(worker.pid, reader, kills)))
        finally:
            worker.send_signal(signal.SIGKILL)
            worker.wait()


def measure(job: int, reader: int, kills: int) -> dict[str, float]:
    """Kills a worker `kills` times, each time some steps after a checkpoint."""
    steps = os.fdopen(reader)
    seconds, lost = [], []

    def next_step() -> int:
        if not (line := steps.readline()):
            raise SystemExit("the training job ended before it was to be killed")
        return int(line)

    target = CHECKPOINT_EVERY
    for _ in range(kills):
        while (made := next_step()) < target + CHECKPOINT_EVERY // 2:
            pass
        os.kill(training_workers(job)[-1], signal.SIGKILL)
        began = time.perf_counter()
        step = next_step()
        # Points that were on their way when the worker died come at once.
        while time.perf_counter() - began < 1.0:
            made, step = step, next_step()
        seconds.append(time.perf_counter() - began)
        lost.append(made % CHECKPOINT_EVERY)
        target = step + CHECKPOINT_EVERY
    return {
        "seconds_from_kill_to_next_new_step": round(statistics.median(seconds), 2),
        "steps_lost": statistics.median(lost),
        "checkpoint_every": CHECKPOINT_EVERY,
        "kills": kills,
    }


def drive(writer: int) -> None:
    """The training job, which writes each new point's step to a pipe."""
    from pipeline.cluster.session import connect
    from pipeline.config import DiffusionConfig, ModelConfig, TrainConfig
    from pipeline.tracking import address
    from pipeline.training.trainer import train

    address.quieten()
    connect(preload="pipeline.training.worker")
    config = TrainConfig(
        data="digits",
        output="run",
        steps=1_000_000,
        workers=2,
        batch_size=32,
        model=ModelConfig(
            model_channels=32, channel_multipliers=(1,), res_blocks=1, attention_resolutions=()
        ),
        diffusion=DiffusionConfig(timesteps=100),
        log_every=1,
        checkpoint_every=CHECKPOINT_EVERY,
        max_failures=-1,
    )
    with os.fdopen(writer, "w", buffering=1) as pipe:
        train(config, on_point=lambda step, values: print(step, file=pipe))


if __name__ == "__main__":
    if "--driver" in sys.argv:
        drive(int(sys.argv[-1]))
    else:
        main("--smoke" in sys.argv)
