"""Measures the memory of a generation job with many files: its driver and its actors, from /proc.

    python -m benchmarks.generate_scale [--smoke]

Two jobs use a very small real network (4x4 images, T = 1). One writes a million samples in files of 4,096 rows. The other
plans a hundred million in files of 1,024 rows and is stopped after a few files. Prints one JSON line, in MiB.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec
from pipeline.models.export import save_model
from pipeline.models.unet import build

ROOT = Path(__file__).parents[1]
SPEC = ModelSpec(
    ModelConfig(model_channels=32, channel_multipliers=(1,), res_blocks=1, attention_resolutions=()),
    ImageConfig(4, 1),
    DiffusionConfig(timesteps=1),
)
ACTOR = "_Actor"


@contextlib.contextmanager
def job(model: Path, output: Path, count: int, rows_per_file: int) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a generation job in its own process group, which is ended on exit."""
    process = subprocess.Popen(
        [
            sys.executable, str(ROOT / "jobs" / "generate.py"), "--model", str(model), "--output", str(output),
            "--count", str(count), "--rows-per-file", str(rows_per_file), "--batch-size", "1024",
            "--max-blank-fraction", "1",
        ],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def resident(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Resident memory in MiB of the driver and of its largest actor."""
    driver, actors = 0.0, [0.0]
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        driver = parent.memory_info().rss / 2**20
        for child in parent.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if ACTOR in " ".join(child.cmdline()):
                    actors.append(child.memory_info().rss / 2**20)
    return driver, max(actors)


def files(output: Path) -> int:
    """The number of finished files."""
    notes = output / "notes"
    return sum(name.endswith(".json") for name in os.listdir(notes)) if notes.exists() else 0  # noqa: PTH208


def written(model: Path, output: Path, count: int) -> dict[str, float]:
    """Runs a whole job. Returns its memory when a tenth was written, and the largest memory from then to the end."""
    total, early, most = -(-count // 4096), (0.0, 0.0), (0.0, 0.0)
    began = time.perf_counter()
    with job(model, output, count, 4096) as process:
        while process.poll() is None:
            if files(output) >= max(2, total // 10):
                now = resident(process)
                early = now if early == (0.0, 0.0) else early
                most = (max(most[0], now[0]), max(most[1], now[1]))
            time.sleep(0.2)
    seconds = time.perf_counter() - began
    manifest = json.loads((output / "manifest.json").read_text())
    return {
        "samples_written": manifest["count"],
        "samples_per_second_with_start": round(count / seconds),
        "driver_at_a_tenth": round(early[0]),
        "driver_most_after": round(most[0]),
        "actor_at_a_tenth": round(early[1]),
        "actor_most_after": round(most[1]),
    }


def planned(model: Path, output: Path, count: int, stop_after: int) -> dict[str, float]:
    """Stops a job after a few files. Returns the largest memory of its driver until then."""
    with job(model, output, count, 1024) as process:
        while process.poll() is None and files(output) < stop_after:
            time.sleep(0.1)
        status = Path(f"/proc/{process.pid}/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return {"samples_planned": count, "driver_peak_of_plan": round(int(peak) / 1024)}


def main(smoke: bool) -> None:
    """Prints one JSON line."""
    with tempfile.TemporaryDirectory() as home:
        model = save_model(Path(home) / "model", build(SPEC).state_dict(), SPEC)
        result = planned(model, Path(home) / "plan", 100_000_000, 8 if smoke else 100)
        if not smoke:
            result |= written(model, Path(home) / "samples", 1_000_000)
    print(json.dumps(result))


if __name__ == "__main__":
    main("--smoke" in sys.argv)
