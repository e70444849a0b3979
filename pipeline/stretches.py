"""Stretches of files on any storage: only bytes that are needed are fetched, and a storage that fails is asked again."""

import copy
import io
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar

from pipeline import storage
from pipeline.patience import FIRST_PAUSE, LONGEST_PAUSE, may_pass
from pipeline.redact import one_line

T = TypeVar("T")
SECONDS = 60.0  # for which a remote storage may fail
TOGETHER = 16  # requests
_WRITTEN_ANEW = "FileExpired"  # of s3fs


def steadily(do: Callable[[], T], uri: str) -> T:
    """Calls `do`, which reads a file, until it succeeds or has failed for `SECONDS`; raises what it raised last.

    A file on a disk, one that isn't there, that may not be read or that was written anew fails at once.
    """
    end, pause = time.monotonic() + SECONDS, FIRST_PAUSE
    while True:
        try:
            return do()
        except Exception as error:
            final = isinstance(error, PermissionError) or type(error).__name__ == _WRITTEN_ANEW
            late = time.monotonic() + pause > end
            if late or final or not may_pass(error) or storage.is_local(uri):
                raise
            if pause == FIRST_PAUSE:
                said = f"{uri} can't be read: {one_line(error)}; trying again for {SECONDS:.0f} s"
                print(said, file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def read_stretch(uri: str, start: int, stop: int) -> bytes:
    """Bytes of a file, in one request; fewer where it ends before."""
    fs, path = storage.open_fs(uri)
    data: bytes = steadily(lambda: fs.cat_file(path, start=start, end=stop), uri)
    return data


def read_stretches(uri: str, wanted: Sequence[tuple[int, int]]) -> list[bytes]:
    """Several stretches, up to `TOGETHER` at a time."""
    if len(wanted) < 2 or storage.is_local(uri):
        return [read_stretch(uri, *stretch) for stretch in wanted]
    with ThreadPoolExecutor(TOGETHER) as pool:
        return list(pool.map(lambda stretch: read_stretch(uri, *stretch), wanted))


def open_file(uri: str, ahead: int = 0) -> IO[bytes]:
    """A file for reading at any place.

    Args:
        ahead: bytes that are fetched at least and kept, for small reads; 0 = each read is a request of just its bytes.
    """
    fs, path = storage.open_fs(uri)
    if storage.is_local(uri):
        return fs.open(path, "rb")
    # fsspec's own would read megabytes ahead (s3fs: 50 MiB).
    file: Any = RemoteFile(uri, steadily(lambda: fs.open(path, "rb", cache_type="none"), uri))
    return io.BufferedReader(file, ahead) if ahead else file


class RemoteFile(io.RawIOBase):
    """A file of which each read is one request; S3 refuses it once the file was written anew. Not for several threads."""

    def __init__(self, uri: str, file: Any) -> None:
        self._uri, self._file, self._place = uri, file, 0
        self.size = int(file.size)

    def again(self) -> "RemoteFile":
        """The same file at a place of its own, without a request."""
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
        data = steadily(lambda: self._fetch(self._place, stop), self._uri) if stop > self._place else b""
        self._place += len(data)
        return data

    def _fetch(self, start: int, stop: int) -> bytes:
        self._file.seek(start)
        data: bytes = self._file.read(stop - start)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
