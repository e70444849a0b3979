"""Search noise schedules, T and the learning rate with Ray Tune, by held-out bits/dim."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import cli
from pipeline.tuning.search import TuneConfig, search


def run(config: TuneConfig) -> dict[str, Any]:
    """Runs the search."""
    return search(config)


if __name__ == "__main__":
    sys.exit(cli.main("tune", __doc__ or "", TuneConfig, run, sys.argv[1:]))
