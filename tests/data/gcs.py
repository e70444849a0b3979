"""A local emulator of Google Cloud Storage, behind a proxy that counts requests and can make them fail."""

from collections.abc import Iterator
from contextlib import contextmanager

import gcsfs
import pytest
from gcp_storage_emulator.server import create_server

from tests.data.weather import Weather


@contextmanager
def gcs_server(bucket: str) -> Iterator[tuple[str, Weather]]:
    """Yield the URI of an empty bucket. The environment points every process started meanwhile to it."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
    server.start()
    proxy = Weather("127.0.0.1", server._api._httpd.server_port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.address)
        patch.setenv("NO_PROXY", "127.0.0.1")
        gcsfs.GCSFileSystem.clear_instance_cache()
        try:
            yield f"gs://{bucket}", proxy
        finally:
            proxy.stop()
            server.stop()
            gcsfs.GCSFileSystem.clear_instance_cache()
