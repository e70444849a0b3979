"""Measures wall time and CPU time from the command to the end of the first step, and during training.

    python -m benchmarks.start [--rounds N] [--smoke]

Runs `jobs/train.py` as a user does, on its own Ray, first with a new MLflow database and then with an existing one. The
end of the first step is the time of the first point in MLflow. The CPU time of every process below the job is read from
/proc. Prints one JSON line. Seconds are medians over the rounds, and "cores" is CPU time divided by wall time between
the first point and the last.
"""

import argparse
import json
import os
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
LOOK_EVERY_SECONDS = 0.05


def kind_of(words: list[str]) -> str:
    """The kind of a job's process, from the words of its command line."""
    line = " ".join(words)
    if title := re.match(r"ray::(\w+)", line):
        return title[1]
    for part, kind in (
        ("forkserver.py --serve", "fork server"),
        ("forkserver.py", "calls to the fork server"),
    ):
        if part in line:
            return kind
    script = next((word for word in words if word.endswith(".py")), words[0] if words else "?")
    return "driver" if script.endswith("jobs/train.py") else Path(script).name


def cpu_seconds(job: int, kinds: dict[int, str], seconds: dict[int, float]) -> None:
    """Updates the kind and the CPU seconds of a job's process and of every process below it, by process id."""
    try:
        processes = [psutil.Process(job), *psutil.Process(job).children(recursive=True)]
    except psutil.Error:
        return
    for process in processes:
        try:
            times = process.cpu_times()
            # A worker takes its title after the fork. A process that has ended has no command line any more.
            if (words := process.cmdline()) or process.pid not in kinds:
                kinds[process.pid] = kind_of(words)
            seconds[process.pid] = times.user + times.system
        except psutil.Error:
            continue


def points_of(database: Path, since: float) -> list[tuple[float, float]]:
    """The points of the curves after `since` (Unix time): seconds since then, and images/s."""
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "select a.timestamp, b.value from metrics a join metrics b using (run_uuid, step)"
            " where a.key = 'loss' and b.key = 'images_per_second' and a.timestamp > ? order by a.step",
            (since * 1000,),
        ).fetchall()
    return [(stamp / 1000 - since, rate) for stamp, rate in rows]


def run(folder: Path, database: Path, flags: list[str]) -> dict[str, Any]:
    """Trains once. Returns wall seconds, and CPU seconds by kind of process."""
    output = Path(tempfile.mkdtemp(dir=folder)) / "run"
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{database}"}
    environment.pop("RAY_ADDRESS", None)
    command = [
        sys.executable,
        str(ROOT / "jobs/train.py"),
        "--data",
        str(folder / "data"),
        "--output",
        str(output),
    ]
    kinds, looks = dict[int, str](), list[tuple[float, dict[int, float]]]()
    began = time.time()
    with subprocess.Popen(
        command + flags, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as job:
        try:
            seconds = dict[int, float]()
            while job.poll() is None:
                cpu_seconds(job.pid, kinds, seconds)
                looks.append((time.time() - began, dict(seconds)))
                time.sleep(LOOK_EVERY_SECONDS)
            assert job.stderr
            if job.returncode:
                raise SystemExit(job.stderr.read())
        finally:
            job.kill()
    ended = time.time() - began
    points = points_of(database, began)
    first, last = points[0][0], points[-1][0]

    def until(moment: float) -> Counter[str]:
        sums, at = Counter[str](), [spent for when, spent in looks if when <= moment][-1]
        for pid, spent in at.items():
            sums[kinds[pid]] += spent
        return sums

    start, rest = until(first), until(last)
    rest.subtract(start)
    return {
        "seconds_to_first_step": first,
        "seconds_in_all": ended,
        "cpu_seconds_to_first_step": start,
        "cores_while_training": Counter({kind: spent / (last - first) for kind, spent in rest.items()}),
    }


def main(rounds: int, smoke: bool) -> dict[str, Any]:
    """Runs all rounds. Returns the result that is printed."""
    network = ["--model-channels", "32", "--channel-multipliers", "1", "--res-blocks", "1"] if smoke else []
    flags = ["--steps", "3" if smoke else "31", "--log-every", "1", "--batch-size", "32", *network]
    flags += ["--cpus-per-worker", str(os.cpu_count())]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare = [sys.executable, str(ROOT / "jobs/prepare.py"), "--source", "digits"]
        began = time.perf_counter()
        subprocess.run([*prepare, "--output", str(folder / "data")], check=True, capture_output=True)
        prepared = time.perf_counter() - began
        new = [run(folder, folder / f"new-{i}.db", flags) for i in range(rounds)]
        again = [run(folder, folder / "new-0.db", flags) for _ in range(rounds)]

    def median(runs: list[dict[str, Any]], name: str) -> float:
        return round(statistics.median(one[name] for one in runs), 1)

    def mean(runs: list[dict[str, Any]], name: str) -> dict[str, float]:
        sums = sum((one[name] for one in runs), Counter[str]())
        found = {kind: round(total / len(runs), 2) for kind, total in sums.most_common()}
        return {kind: value for kind, value in found.items() if value >= 0.01}

    start = mean(again, "cpu_seconds_to_first_step")
    return {
        "prepare_seconds": round(prepared, 1),
        "seconds_to_first_step_with_a_new_database": median(new, "seconds_to_first_step"),
        "seconds_to_first_step": median(again, "seconds_to_first_step"),
        "seconds_in_all": median(again, "seconds_in_all"),
        "cpu_seconds_to_first_step_in_all": round(sum(start.values()), 1),
        "cpu_seconds_to_first_step": start,
        "cores_while_training": mean(again, "cores_while_training"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="run one round of a small network")
    options = parser.parse_args()
    print(json.dumps(main(1 if options.smoke else options.rounds, options.smoke)))
