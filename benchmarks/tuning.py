"""Searches on digits: compares the winner with the default schedule in new, equally long runs, and TPE with random.

Prints one JSON line. The bits/dim of the trained models use all held-out images and every term of the bound. `--output`
keeps the searches, so that the same command continues an interrupted benchmark.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cluster.pool import ActorPool
from pipeline.cluster.session import connect
from pipeline.commands.cli import result_stream
from pipeline.config import DiffusionConfig, TrainConfig
from pipeline.data.index import DatasetIndex, open_splits
from pipeline.data.shards import PrepareConfig, prepare
from pipeline.evaluation.bits import held_out_bits
from pipeline.evaluation.config import BITS_PER_DIM
from pipeline.models.export import load_model
from pipeline.tracking.address import quieten, tracking_uri
from pipeline.tracking.runs import open_client
from pipeline.training.trainer import train
from pipeline.tuning import ledger
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.objective import common_numbers_gain
from pipeline.tuning.search import search
from pipeline.tuning.trial import training

SPACE = Path(__file__).with_name("tuning_space.yaml")


def run_search(config: TuneConfig) -> dict[str, Any]:
    """Runs or continues one search. Its folder keeps the wall time of all attempts."""
    note = Path(config.output) / "seconds.json"
    spent = json.loads(note.read_text()) if note.exists() else 0.0
    began = time.perf_counter()
    result = search(replace(config, resume=(Path(config.output) / "search.json").exists()))
    seconds = spent + time.perf_counter() - began if not (Path(config.output) / "done").exists() else spent
    note.write_text(json.dumps(seconds))
    (Path(config.output) / "done").touch()
    return result | {"seconds": round(seconds)}


def fresh(config: TrainConfig, held_out: DatasetIndex) -> float:
    """Trains a new run. Returns its bits/dim on all held-out images."""
    trained = train(config)
    model, spec = load_model(trained.folder)
    return held_out_bits(model, spec, held_out, np.arange(held_out.rows), pool=ActorPool()).bits_per_dim


def gains(output: str) -> dict[str, float]:
    """The gain from common random numbers (see `common_numbers_gain`), over all pairs of trials.

    A pair is compared at the last rung that both trials reached.
    """
    reached = [record.rungs for record in ledger.read_all(output) if record.rungs]
    pairs = []
    for one, other in itertools.combinations(reached, 2):
        last = min(len(one), len(other)) - 1
        pairs.append(common_numbers_gain(one[last].per_image, other[last].per_image))
    if not pairs:
        return {}
    return {"median": float(np.median(pairs)), "least": min(pairs), "most": max(pairs), "pairs": len(pairs)}


def starts(output: str) -> dict[str, float]:
    """Seconds from a trial's MLflow run to its first point. The first point comes after a twentieth of the steps."""
    client, seconds = open_client(), []
    for record in ledger.read_all(output):
        if record.run_id and (points := client.get_metric_history(record.run_id, "loss")):
            opened = client.get_run(record.run_id).info.start_time
            seconds.append((min(point.timestamp for point in points) - opened) / 1000)
    return (
        {"median": float(np.median(seconds)), "least": min(seconds), "most": max(seconds)} if seconds else {}
    )


def main() -> None:
    """Runs the benchmark and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", default="", help="folder to keep between runs; empty = a temporary folder"
    )
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--images", type=int, default=24_576)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.trials, options.images, options.seeds = 2, 1536, 1
    output = Path(options.output or tempfile.mkdtemp(prefix="ray-ddpm-tuning-")).absolute()
    quieten()
    connect(environment={"MLFLOW_TRACKING_URI": tracking_uri()}, preload="pipeline.training.worker")
    data = str(output / "digits")
    if not (output / "digits" / "manifest.json").exists():
        prepare(PrepareConfig(output=data, source="digits"))
    base = TuneConfig(
        data=data,
        output=str(output / "tpe"),
        space=str(SPACE),
        trials=options.trials,
        images=options.images,
        max_images=128,
        terms=20,
        register="",
        experiment="benchmark",
    )
    tpe = run_search(base)
    chance = run_search(replace(base, output=str(output / "random"), searcher="random"))
    winner = ledger.ranked(ledger.read_all(base.output), BITS_PER_DIM)[0]
    best = replace(training(base, winner), resume=False)
    # The default noise process of jobs/train.py, with all other settings of the winner.
    default = replace(best, diffusion=DiffusionConfig())
    held_out = open_splits(data)["validation"]
    results: dict[str, list[float]] = {"winner": [], "default": []}
    for seed, (name, config) in itertools.product(
        range(1, options.seeds + 1), (("winner", best), ("default", default))
    ):
        home = output / "fresh" / f"{name}-{seed}"
        note = home / "bits.json"
        if not note.exists():
            bits = fresh(
                replace(config, seed=seed, output=str(home), run_name=home.name, resume=home.exists()),
                held_out,
            )
            note.write_text(json.dumps(bits))
        results[name].append(json.loads(note.read_text()))
        print(f"fresh run, {name}, seed {seed}: {results[name][-1]:.4f} bits/dim", file=sys.stderr)
    better = np.array(results["default"]) - np.array(results["winner"])
    line = {
        "trials": options.trials,
        "images": options.images,
        "tpe": {"seconds": tpe["seconds"], BITS_PER_DIM: tpe["metrics"][BITS_PER_DIM], "flags": tpe["flags"]},
        "random": {
            "seconds": chance["seconds"],
            BITS_PER_DIM: chance["metrics"][BITS_PER_DIM],
            "flags": chance["flags"],
        },
        "fresh": results,
        "winner_better_by": {"mean": float(better.mean()), "least": float(better.min())},
        "common_random_numbers_gain": gains(base.output),
        "seconds_to_a_trials_first_point": starts(base.output),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    with result_stream() as stream:
        sys.stdout, console = stream, sys.stdout
        main()
        sys.stdout = console
