"""Search noise schedules, T, the learning rate or any flag of the train job, by held-out bits/dim or sample quality.

Example: ray-ddpm tune --data data/photos --output searches/photos --trials 20
"""

from typing import Any

from pipeline import disk_cache
from pipeline.commands import cli
from pipeline.tuning.config import TuneConfig


def execute(config: TuneConfig, checked: Any = None) -> dict[str, Any]:
    """Runs the search with the result of `check`."""
    from pipeline.tuning.search import search

    return search(config, checked=checked)


def check(config: TuneConfig) -> Any:
    """Checks the settings before a cluster is needed, and opens the data."""
    from pipeline.tuning.search import check_search

    return check_search(config)


def main(arguments: list[str]) -> int:
    """Runs the job with these flags; returns its exit code."""
    return cli.main(
        "tune",
        __doc__ or "",
        TuneConfig,
        execute,
        arguments,
        check=check,
        workers=cli.training_workers,
        meanwhile=cli.open_tracking,
        environment=lambda config: disk_cache.environment(config.cache_dir, config.cache_gb),
    )
