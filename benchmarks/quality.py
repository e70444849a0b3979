"""Measures the quality of a class-conditional model: the pipeline from data to samples, compared with real images.

    python -m benchmarks.quality [--data digits|mnist|cifar10] [--folder FOLDER] [--output FOLDER] [--smoke]

Runs prepare, train, generate and evaluate on digits (8x8), on MNIST padded to 32x32 (gzipped IDX files in --folder), or
on CIFAR-10 (a Parquet file with JPEG images in --folder). The same command with the same --output continues an
interrupted run. The ratios compare the samples with equally many real held-out images. The classification accuracy
score is the accuracy on held-out images of a classifier trained on the samples alone; `_real` marks that of one trained
on as many real images. The cost of training is the CPU time of its workers in this call. With a GPU, CIFAR-10 gets the
network of Ho et al. 2020 and more steps.
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
import torch

from benchmarks.first_step import SHARED
from pipeline.cluster.session import connect
from pipeline.commands import cli, evaluate, generate, prepare, train
from pipeline.config import DiffusionConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipeline.data.shards import PrepareConfig
from pipeline.evaluation.config import EvaluateConfig
from pipeline.generation.config import GenerateConfig
from pipeline.tracking import address

GPU = torch.cuda.is_available()
FOLDERS = {"digits": "", "mnist": str(SHARED / "mnist"), "cifar10": str(SHARED / "cifar10")}
PADDING = 2
SAMPLES = {"digits": 360, "mnist": 600, "cifar10": 500}
"""Number of samples, equal to the number of held-out real images; CIFAR-10 on a GPU has ten times as many."""
GUIDANCE = {"digits": 1.5, "mnist": 2.5, "cifar10": 1.5}


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


def prepared(name: str, folder: Path, root: Path, smoke: bool) -> PrepareConfig:
    output = str(root / "data")
    if name == "digits":
        return PrepareConfig(output=output, source="digits", validation_fraction=0.2)
    if name == "cifar10":
        # A CPU trains on images of half the size, because it could show the network too few whole ones in an hour.
        size, fraction = (32, 0.1) if GPU else (16, 0.01)
        return PrepareConfig(output=output, input=str(folder), image_size=size, validation_fraction=fraction)
    if not (root / "padded" / "train-labels-idx1-ubyte").exists():
        pad_mnist(folder, root / "padded", 2000 if smoke else 60_000)
    fraction = 0.05 if smoke else 0.01
    return PrepareConfig(
        output=output, source="idx", input=str(root / "padded"), validation_fraction=fraction
    )


def training(name: str, root: Path, steps: int) -> TrainConfig:
    common: dict[str, Any] = {
        "data": str(root / "data"),
        "output": str(root / "run"),
        "resume": (root / "run" / "run.json").exists(),
        "diffusion": DiffusionConfig(schedule="cosine", timesteps=400),
        "log_every": 10,
        "checkpoint_every": 200,
        "gpu": GPU,
        "experiment": "quality",
    }
    if name == "digits":
        return TrainConfig(
            **common,
            steps=steps or 600,
            cpus_per_worker=2,
            model=ModelConfig(32, (1, 2), attention_resolutions=(4,), class_conditional=True),
            optimizer=OptimizerConfig(learning_rate=2e-3, ema_decays=(0.99,)),
        )
    if name == "cifar10" and GPU:
        return TrainConfig(
            **common | {"log_every": 200, "checkpoint_every": 2000},
            steps=steps or 4500,
            batch_size=128,
            random_flip=True,
            model=ModelConfig(128, (1, 2, 2, 2), class_conditional=True),
            optimizer=OptimizerConfig(learning_rate=4e-4, ema_decays=(0.999,)),
        )
    small = {"mnist": (1, 1, 2, 2), "cifar10": (1, 2, 2)}[name]
    return TrainConfig(
        **common,
        steps=steps or 4000,
        workers=1 if GPU else 2,
        batch_size=64,
        random_flip=name == "cifar10",
        model=ModelConfig(32, small, res_blocks=1, attention_resolutions=(), class_conditional=True),
        optimizer=OptimizerConfig(learning_rate=2e-3, ema_decays=(0.998,)),
    )


def main(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Runs the jobs. Returns the result that is printed."""
    name, smoke = arguments.data, arguments.smoke
    guidance = arguments.guidance or GUIDANCE[name]
    count = 64 if smoke else SAMPLES[name] * (10 if GPU and name == "cifar10" else 1)
    connect(
        environment={"MLFLOW_TRACKING_URI": address.tracking_uri(), "OMP_WAIT_POLICY": "PASSIVE"},
        preload="pipeline.training.worker",
    )
    prepare.execute(prepared(name, Path(arguments.folder or FOLDERS[name]), root, smoke))
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
            count=count,
            sampler="dpm_solver",
            sampling_steps=2 if smoke else 25,
            least_alpha_bar=0.02 if name == "cifar10" else 0.0,
            guidance=guidance,
            gpu=GPU,
            precision="auto",
        )
    )
    measured = evaluate.execute(
        EvaluateConfig(
            model,
            str(root / "data"),
            samples,
            str(root / "evaluation"),
            terms=2 if smoke else 0 if name == "digits" else 20,
            max_images=8 if smoke else min(count, 1000),
            classifier_steps=10 if smoke else 500,
        )
    )["metrics"]
    for key in ("knn_label_accuracy", "knn_label_accuracy_real", "frechet_distance", "frechet_distance_real"):
        result[key] = round(measured[key], 4)
    for key in (
        "precision", "recall", "bits_per_dim", "bits_per_dim_stderr", "bits_per_dim_softmax",
        "classification_accuracy_score", "classification_accuracy_score_real",
    ):  # fmt: skip
        result[key] = round(measured[key], 4)
    ratio = measured["frechet_distance"] / max(measured["frechet_distance_real"], 1e-9)
    accuracy = measured["knn_label_accuracy"] / measured["knn_label_accuracy_real"]
    return result | {"ratio_frechet": round(ratio, 3), "ratio_accuracy": round(accuracy, 4)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=list(SAMPLES), default="digits")
    parser.add_argument("--folder", default="", help="folder of the images of MNIST or CIFAR-10")
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
