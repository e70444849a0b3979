"""Measures the quality of a class-conditional model: the pipeline from data to samples, compared with real images.

    python -m benchmarks.quality [--data mnist] [--mnist FOLDER] [--output FOLDER] [--smoke]

Runs prepare, train, generate and evaluate on digits (8x8), or on MNIST padded to 32x32 (gzipped IDX files in --mnist).
The same command with the same --output continues an interrupted run. The ratios compare the samples with equally many
real held-out images. The cost of training is the CPU time of its workers in this call.
"""

import argparse
import gzip
import json
import struct
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pipeline.cluster.session import connect
from pipeline.commands import cli, evaluate, generate, prepare, train
from pipeline.config import DiffusionConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipeline.data.shards import PrepareConfig
from pipeline.evaluation.config import EvaluateConfig
from pipeline.generation.config import GenerateConfig
from pipeline.tracking import address

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"
PADDING = 2
SAMPLES = {"digits": 360, "mnist": 600}
"""Number of samples, equal to the number of held-out real images."""
GUIDANCE = {"digits": 1.5, "mnist": 2.5}


class CpuTime:
    """Sums the CPU seconds of this process's training workers. It reads them every second."""

    def __init__(self) -> None:
        self._seconds = dict[int, float]()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "CpuTime":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(1):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        used = process.cpu_times()
                        self._seconds[process.pid] = used.user + used.system
                except psutil.Error:
                    continue

    def total(self) -> float:
        return sum(self._seconds.values())


def pad_mnist(source: Path, output: Path, most: int) -> None:
    """Writes the first `most` images of MNIST's training set as IDX files, with `PADDING` black pixels on every side."""
    output.mkdir(parents=True, exist_ok=True)
    data = gzip.decompress((source / "train-images-idx3-ubyte.gz").read_bytes())
    magic, count, rows, columns = struct.unpack(">IIII", data[:16])
    pixels = np.frombuffer(data, np.uint8, offset=16).reshape(count, rows, columns)[:most]
    padded = np.pad(pixels, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    header = struct.pack(">IIII", magic, *padded.shape)
    (output / "train-images-idx3-ubyte").write_bytes(header + padded.tobytes())
    labels = gzip.decompress((source / "train-labels-idx1-ubyte.gz").read_bytes())
    (output / "train-labels-idx1-ubyte").write_bytes(
        labels[:4] + struct.pack(">I", len(padded)) + labels[8 : 8 + len(padded)]
    )


def prepared(name: str, mnist: Path, root: Path, smoke: bool) -> PrepareConfig:
    if name == "digits":
        return PrepareConfig(output=str(root / "data"), source="digits", validation_fraction=0.2)
    if not (root / "padded" / "train-labels-idx1-ubyte").exists():
        pad_mnist(mnist, root / "padded", 2000 if smoke else 60_000)
    return PrepareConfig(
        output=str(root / "data"),
        source="idx",
        input=str(root / "padded"),
        validation_fraction=0.05 if smoke else 0.01,
    )


def training(name: str, root: Path, steps: int) -> TrainConfig:
    common: dict[str, Any] = {
        "data": str(root / "data"),
        "output": str(root / "run"),
        "resume": (root / "run" / "run.json").exists(),
        "diffusion": DiffusionConfig(schedule="cosine", timesteps=400),
        "log_every": 10,
        "experiment": "quality",
    }
    if name == "digits":
        return TrainConfig(
            **common,
            steps=steps or 600,
            cpus_per_worker=2,
            model=ModelConfig(32, (1, 2), attention_resolutions=(4,), class_conditional=True),
            optimizer=OptimizerConfig(learning_rate=2e-3, ema_decays=(0.99,)),
            checkpoint_every=200,
        )
    return TrainConfig(
        **common,
        steps=steps or 4000,
        workers=2,
        batch_size=64,
        model=ModelConfig(32, (1, 1, 2, 2), res_blocks=1, attention_resolutions=(), class_conditional=True),
        optimizer=OptimizerConfig(learning_rate=2e-3, ema_decays=(0.998,)),
        checkpoint_every=200,
    )


def main(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Runs the jobs. Returns the result that is printed."""
    name, smoke = arguments.data, arguments.smoke
    guidance = arguments.guidance or GUIDANCE[name]
    connect(
        environment={"MLFLOW_TRACKING_URI": address.tracking_uri(), "OMP_WAIT_POLICY": "PASSIVE"},
        preload="pipeline.training.worker",
    )
    prepare.execute(prepared(name, Path(arguments.mnist), root, smoke))
    settings = training(name, root, 4 if smoke else arguments.steps)
    began = time.perf_counter()
    with CpuTime() as cpu:
        trained = train.execute(settings, train.check(settings))
    result = {
        "data": name,
        "steps": trained["count"],
        "guidance": guidance,
        "training_cpu_minutes": round(cpu.total() / 60, 2),
        "training_wall_minutes": round((time.perf_counter() - began) / 60, 2),
    }
    model, samples = str(root / "run" / "model"), str(root / f"samples-{trained['count']}-{guidance:g}")
    generate.execute(
        GenerateConfig(
            model,
            samples,
            count=64 if smoke else SAMPLES[name],
            sampler="dpm_solver",
            sampling_steps=2 if smoke else 25,
            guidance=guidance,
        )
    )
    measured = evaluate.execute(
        EvaluateConfig(
            model,
            str(root / "data"),
            samples,
            str(root / "evaluation"),
            terms=2 if smoke else 0 if name == "digits" else 20,
            max_images=8 if smoke else 360,
            classifier_steps=10 if smoke else 500,
        )
    )["metrics"]
    for key in ("knn_label_accuracy", "knn_label_accuracy_real", "frechet_distance", "frechet_distance_real"):
        result[key] = round(measured[key], 4)
    for key in ("precision", "recall", "bits_per_dim", "bits_per_dim_stderr"):
        result[key] = round(measured[key], 4)
    ratio = measured["frechet_distance"] / max(measured["frechet_distance_real"], 1e-9)
    accuracy = measured["knn_label_accuracy"] / measured["knn_label_accuracy_real"]
    return result | {"ratio_frechet": round(ratio, 3), "ratio_accuracy": round(accuracy, 4)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=list(SAMPLES), default="digits")
    parser.add_argument("--mnist", default=str(MNIST), help="folder of MNIST's gzipped IDX files")
    parser.add_argument("--output", default="", help="folder to keep; empty = a temporary folder")
    parser.add_argument(
        "--steps", type=int, default=0, help="optimizer steps; 0 = a number that suits the data"
    )
    parser.add_argument(
        "--guidance", type=float, default=0.0, help="guidance scale; 0 = a value that suits the data"
    )
    parser.add_argument("--smoke", action="store_true", help="run only a few steps")
    options = parser.parse_args()
    with cli.result_stream() as stream, tempfile.TemporaryDirectory() as temporary:
        address.quieten()
        where = Path(options.output or temporary).absolute()
        print(json.dumps(main(options, where)), file=stream, flush=True)
