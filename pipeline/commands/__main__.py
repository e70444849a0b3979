"""`ray-ddpm JOB FLAGS…`: every job under one command, the same as `python jobs/JOB.py FLAGS…`."""

import difflib
import importlib
import sys

from pipeline import __version__
from pipeline.display import reader_may_leave

JOBS = {
    "prepare": "turn images into Parquet shards",
    "train": "train a model",
    "tune": "search noise schedules, T and any other flag of training",
    "generate": "make a dataset of samples, each exactly once",
    "evaluate": "measure a model and its samples",
    "plot": "draw a model: samples, the process, schedules, the bound",
    "export": "write a model for diffusers, or as safetensors with a card",
    "submit": "run a job on a Ray cluster, from outside",
    "demo": "the whole pipeline on handwritten digits",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the job that the first argument names; returns its exit code, or 2 if there is no such job."""
    job, *flags = (sys.argv[1:] if arguments is None else arguments) or [""]
    if job in JOBS:
        return int(importlib.import_module(f"pipeline.commands.{job}").main(flags))
    if job == "--version":
        print(f"ray-ddpm {__version__}")
        return 0
    if job in ("-h", "--help"):
        with reader_may_leave():
            print(usage())
        return 0
    if not job:
        print(usage(), file=sys.stderr)
        return 2
    near = difflib.get_close_matches(job, JOBS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    print(f"ray-ddpm: no job {job!r}{hint}: give one of {', '.join(JOBS)}", file=sys.stderr)
    return 2


def usage() -> str:
    """The jobs, one a line."""
    lines = "\n".join(f"  {job:10} {about}" for job, about in JOBS.items())
    return f"usage: ray-ddpm JOB [FLAGS]\n\n{lines}\n\n`ray-ddpm JOB --help` shows a job's flags."


if __name__ == "__main__":
    sys.exit(main())
