"""Turn images into Parquet shards that training streams, with a manifest and a list of unusable images.

Example: ray-ddpm prepare --input photos/ --image-size 64 --output data/photos
"""

from typing import Any

from pipeline.commands import cli
from pipeline.data.shards import PrepareConfig, prepare


def execute(config: PrepareConfig) -> dict[str, Any]:
    """Writes the shards."""
    manifest = prepare(config)
    return {"output": config.output, "count": sum(split.rows for split in manifest.splits.values())}


def main(arguments: list[str]) -> int:
    """Runs the job with these flags; returns its exit code."""
    return cli.main("prepare", __doc__ or "", PrepareConfig, execute, arguments, ray="when needed")
