from collections.abc import Iterator

import pytest
import ray

from pipeline.cluster.session import connect
from tests.data.common import leave_ray
from tests.data.s3 import s3_server


@pytest.fixture(scope="package")
def s3() -> Iterator[str]:
    with s3_server("images") as uri:
        yield uri


@pytest.fixture(scope="package")
def cluster(s3: str) -> Iterator[None]:
    """A small Ray whose workers reach the S3 server."""
    mine = not ray.is_initialized()
    connect()
    yield
    if mine:
        leave_ray()
