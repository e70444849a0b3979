"""A local S3 server (moto), behind a proxy that can make requests fail."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import requests
import s3fs
from moto.server import ThreadedMotoServer

from tests.data.weather import Weather

# The proxies of the servers that run, newest last.
weather: list[Weather] = []


@contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """Yield the URI of an empty bucket. The environment points every process started meanwhile to it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = Weather(*server.get_host_and_port())
    weather.append(proxy)
    settings = {
        "AWS_ENDPOINT_URL": proxy.address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    # All servers of a process share their buckets, so only the first one may empty them.
    if len(weather) == 1:
        requests.post(f"{proxy.address}/moto-api/reset", timeout=30).raise_for_status()
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        s3fs.S3FileSystem().mkdir(bucket)
        yield f"s3://{bucket}"
    finally:
        weather.remove(proxy)
        proxy.stop()
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
        s3fs.S3FileSystem.clear_instance_cache()
