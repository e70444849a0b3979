"""Search schedules, T, learning rate, width and any other flag of training, by held-out bits/dim or sample quality."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import cli
from pipeline.tuning.config import TuneConfig


def run(config: TuneConfig) -> dict[str, Any]:
    """Runs the search."""
    from pipeline.tuning.search import search

    return search(config)


def check(config: TuneConfig) -> None:
    """Refuses what can't work, before a cluster is asked for anything."""
    from pipeline.tuning.search import check_search

    check_search(config)


if __name__ == "__main__":
    sys.exit(cli.main("tune", __doc__ or "", TuneConfig, run, sys.argv[1:], check=check))
