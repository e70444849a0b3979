import os
from collections.abc import Iterator

import pytest
import ray
import s3fs
from moto.server import ThreadedMotoServer

from pipeline.cluster import connect


@pytest.fixture(scope="package")
def s3() -> Iterator[str]:
    """A bucket on a real S3 server of this machine, as the environment describes it to every process."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem().mkdir("images")
    yield "s3://images"
    server.stop()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


@pytest.fixture(scope="package")
def cluster(s3: str) -> Iterator[None]:
    """A small Ray whose workers reach the S3 server."""
    mine = not ray.is_initialized()
    connect()
    yield
    if mine:
        ray.shutdown()
