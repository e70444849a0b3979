"""Measures the time from SIGKILL of one of two training workers to the next new step, and the steps lost.

    python -m benchmarks.recovery [--smoke]

Trains on handwritten digits on its own local Ray. Prints one JSON line with medians over the kills: the seconds until the
run's curve passes the step at which the worker died, and the number of steps that are repeated, next to the checkpoint
interval, which limits it.

It also measures the minimum for Ray Train: a plain run on a plain Ray, whose two workers import torch, form the same
process group and sum a number at every step.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TextIO

import psutil

ROOT = Path(__file__).parents[1]
CHECKPOINT_EVERY = 10


def training_workers(job: int) -> list[int]:
    """The ids of the processes of Ray Train's workers below a job.

    Args:
        job: process id of the job.
    """
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `of_job` ends its job
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        environment.pop("RAY_ADDRESS", None)
        environment["PYTHONPATH"] = str(ROOT)
        prepare = [sys.executable, str(ROOT / "jobs/prepare.py"), "--source", "digits", "--output", "digits"]
        subprocess.run(prepare, check=True, env=environment, capture_output=True)
        ours = of_job("--driver", environment, kills)
        plain = of_job("--plain", environment, kills)
        seconds = ours["seconds_from_kill_to_next_new_step"], plain["seconds_from_kill_to_next_new_step"]
        print(
            json.dumps(
                ours | {"plain_ray_train_seconds": seconds[1], "ratio": round(seconds[0] / seconds[1], 2)}
            )
        )


def of_job(kind: str, environment: dict[str, str], kills: int) -> dict[str, float]:
    """Starts a training job and kills its workers.

    Args:
        kind: "--driver" for this project's run, "--plain" for a plain run of Ray Train.
        kills: number of kills.
    """
    os.mkfifo(pipe := Path(kind.strip("-")).absolute())
    command = [sys.executable, __file__, kind, str(pipe)]
    open_end = os.open(pipe, os.O_RDWR)  # a worker that is killed does not end the pipe; the job does
    job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    threading.Thread(target=lambda: (job.wait(), os.close(open_end)), daemon=True).start()
    try:
        with pipe.open() as steps:
            return measure(job.pid, steps, kills)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()


def measure(job: int, steps: TextIO, kills: int) -> dict[str, float]:
    """Kills a worker `kills` times, each time some steps after a checkpoint.

    Args:
        job: process id of the job.
        steps: stream with a line for each new step.
    """
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
        # Points that the worker sent before it died arrive within a second.
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


def drive(pipe: str) -> None:
    """Runs the training job, which writes the step of each new point to a pipe."""
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
        max_failures=1000,
    )
    with Path(pipe).open("w", buffering=1) as steps:
        train(config, on_point=lambda step, values: print(step, file=steps))


def plain_loop(settings: dict[str, str]) -> None:
    """A worker of the plain run. Its steps count the time, so a restarted group continues at the present step."""
    import ray.train
    import torch
    import torch.distributed

    rank = ray.train.get_context().get_world_rank()
    with Path(settings["pipe"]).open("a", buffering=1) as steps:
        while True:
            torch.distributed.all_reduce(torch.ones(1))
            time.sleep(0.1)
            if rank == 0:
                print(int(10 * (time.time() - float(settings["began"]))), file=steps)


def drive_plainly(pipe: str) -> None:
    """Runs a training job with Ray Train alone."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address="local", runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    TorchTrainer(
        plain_loop,
        train_loop_config={"pipe": pipe, "began": str(time.time())},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            storage_path=str(Path("plain-run").absolute()), failure_config=FailureConfig(-1)
        ),
    ).fit()


if __name__ == "__main__":
    if "--driver" in sys.argv:
        drive(sys.argv[-1])
    elif "--plain" in sys.argv:
        from benchmarks.recovery import drive_plainly as by_module

        by_module(sys.argv[-1])  # imported by its module, so that Ray's workers find the loop
    else:
        main("--smoke" in sys.argv)
