"""Reads byte ranges of files on any storage. Only the bytes needed are fetched, and failed requests are repeated."""

import copy
import io
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import IO, Any, TypeVar

from fsspec import AbstractFileSystem

from pipeline import disk_cache, storage
from pipeline.errors import Outage
from pipeline.patience import may_pass, patiently

T = TypeVar("T")
SECONDS = 60.0  # how long to repeat requests to a failing remote storage
TOGETHER = 16  # requests at a time
_KNOWN_FILES = 4096
_WRITTEN_ANEW = "FileExpired"  # s3fs raises this for a file that was overwritten


def steadily(do: Callable[[], T], uri: str) -> T:
    """Calls `do`, which reads a file, until it succeeds or has failed for `SECONDS`; then raises its last error.

    Some errors are raised at once: those of local files, missing files, missing permission, and overwritten files.
    """

    def passes(error: Exception) -> bool:
        final = isinstance(error, PermissionError) or type(error).__name__ == _WRITTEN_ANEW
        return may_pass(error) and not (final or storage.is_local(uri))

    say = partial(print, file=sys.stderr, flush=True)
    try:
        return patiently(do, f"{uri} can't be read", SECONDS, say, passes)
    except Outage as outage:  # from `patiently`, with the last error as its cause; or from `do` itself
        raise outage.__cause__ or outage from None


def version_of(info: dict[str, Any]) -> str:
    """A text that changes whenever a file's content does, from the storage's details of the file."""
    names = ("ETag", "etag", "md5Hash", "sha256", "blob_id")  # blob_id: Hugging Face Hub
    etag = next(filter(None, map(info.get, names)), None)
    return str(etag or (info["size"], info.get("mtime") or info.get("LastModified")))


def read_stretch(uri: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file, in one request; fewer if the file ends earlier."""
    if disk_cache.is_used() and not storage.is_local(uri):
        with _opened(uri).again() as file:
            file.seek(start)
            return file.read(stop - start)
    fs, path = storage.open_fs(uri)
    # fsspec's generic `cat_file` (hf://, sftp://) opens the file, so it needs the same option as `_open`. Object
    # stores have their own `cat_file`, which requests only the range.
    own = getattr(fs.cat_file, "__func__", None) is AbstractFileSystem.cat_file
    options = {"cache_type": "none"} if own else {}
    data: bytes = steadily(lambda: fs.cat_file(path, start=start, end=stop, **options), uri)
    return data


def read_stretches(uri: str, wanted: Sequence[tuple[int, int]]) -> list[bytes]:
    """Several ranges [start, stop) of a file, up to `TOGETHER` requests at a time."""
    if len(wanted) < 2 or storage.is_local(uri):
        return [read_stretch(uri, *stretch) for stretch in wanted]
    with ThreadPoolExecutor(TOGETHER) as pool:
        return list(pool.map(lambda stretch: read_stretch(uri, *stretch), wanted))


def open_file(uri: str, ahead: int = 0) -> IO[bytes]:
    """Opens a file for random reading.

    Args:
        ahead: least number of bytes to fetch and buffer, for small reads; 0 = each read is a request of exactly its
            bytes.
    """
    fs, path = storage.open_fs(uri)
    if storage.is_local(uri):
        return fs.open(path, "rb")
    file: Any = _opened(uri).again() if disk_cache.is_used() else _open(uri)
    return io.BufferedReader(file, ahead) if ahead else file


def _open(uri: str) -> "RemoteFile":
    fs, path = storage.open_fs(uri)
    # fsspec's default caches would read megabytes ahead (s3fs: 50 MiB).
    return RemoteFile(uri, steadily(lambda: fs.open(path, "rb", cache_type="none"), uri))


@lru_cache(maxsize=_KNOWN_FILES)
def _opened(uri: str) -> "RemoteFile":
    """Keeps remote files open where ranges are cached on this node's disk, so that each version is requested once."""
    return _open(uri)


class RemoteFile(io.RawIOBase):
    """A remote file; each read is one request. S3 refuses reads once the file was overwritten. Not thread-safe."""

    def __init__(self, uri: str, file: Any) -> None:
        self._uri, self._file, self._place = uri, file, 0
        self.size = int(file.size)

    def again(self) -> "RemoteFile":
        """The same file with a position of its own, without a request."""
        return RemoteFile(self._uri, copy.copy(self._file))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        stop = self.size if size < 0 else min(self._place + size, self.size)
        data = self._stretch(self._place, stop) if stop > self._place else b""
        self._place += len(data)
        return data

    def _stretch(self, start: int, stop: int) -> bytes:
        def fetch() -> bytes:
            self._file.seek(start)
            data: bytes = self._file.read(stop - start)
            return data

        if not disk_cache.is_used():
            return steadily(fetch, self._uri)
        what = f"{self._uri} {version_of(self._file.details)} {start} {stop}"
        return disk_cache.kept(what, stop - start, lambda: steadily(fetch, self._uri))

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
