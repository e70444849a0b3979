"""The nodes that the autoscaler of growing.py adds. A module of its own, because every worker imports that one."""

import os
import tempfile
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

from tests.jobs.forked import forked_workers
from tests.system.cluster import PRELOAD
from tests.system.growing import PLACES, TEMPLATE


class ForkingProvider(FakeMultiNodeProvider):
    """Starts nodes that fork their workers."""

    def create_node_with_resources_and_labels(self, *arguments: Any, **options: Any) -> Any:
        # Below the cluster's own folder, which is removed at its end.
        folder = tempfile.mkdtemp(prefix="fork-", dir=Path(os.environ[PLACES]).parent)
        with forked_workers(PRELOAD, os.environ[TEMPLATE], Path(folder)):
            return super().create_node_with_resources_and_labels(*arguments, **options)
