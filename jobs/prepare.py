"""Turn images into Parquet shards that training streams, with a manifest and a quarantine list."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import cli
from pipeline.data.shards import PrepareConfig, prepare


def run(config: PrepareConfig) -> dict[str, Any]:
    """Writes the shards."""
    manifest = prepare(config)
    return {"output": config.output, "count": sum(split.rows for split in manifest.splits.values())}


if __name__ == "__main__":
    sys.exit(cli.main("prepare", __doc__ or "", PrepareConfig, run, sys.argv[1:]))
