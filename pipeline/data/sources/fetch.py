"""Fetches files, several at a time from remote storage, and tells a bad file from failing storage."""

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipeline import storage
from pipeline.errors import InputError
from pipeline.stretches import steadily

THREADS = 16
MOST_BYTES = 2**30  # largest file that is read as an image; more than any image that is decoded takes
_Given = TypeVar("_Given")
_Got = TypeVar("_Got")


def in_order(call: Callable[[_Given], _Got], given: Iterable[_Given], uri: str) -> Iterator[_Got]:
    """Calls a reading function on each value and yields the results in order.

    Args:
        uri: where it reads. For remote storage up to `THREADS` calls run at a time, and no more run ahead.
    """
    if storage.is_local(uri):
        yield from map(call, given)
        return
    waiting = deque[Future[_Got]]()
    with ThreadPoolExecutor(THREADS) as pool:
        for one in given:
            waiting.append(pool.submit(call, one))
            if len(waiting) == THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def fault_of_file(error: OSError, uri: str) -> str:
    """The reason why this one file can't be read.

    Raises:
        OSError: the same error, if the storage is at fault and not the file.
    """
    if isinstance(error, FileNotFoundError):
        if storage.is_local(uri) and os.path.islink(storage.open_fs(uri)[1]):  # noqa: PTH114
            return "a link to nothing"
        return "can't be read: it no longer exists"
    if isinstance(error, PermissionError):
        return "can't be read: permission denied"
    if error.errno == errno.ELOOP:
        return "can't be read: a link that leads to itself"
    raise error


@contextlib.contextmanager
def refusing(uri: str) -> Iterator[None]:
    """Turns an error that is the fault of this one file into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{uri}: {fault_of_file(error, uri)}") from None


def local_stamp(uri: str) -> tuple[int, int, int] | None:
    """Changes when a local file is replaced or changed; None for a remote file, since asking would cost a request."""
    if not uri.startswith("/"):  # decided by the text alone, because this runs for every read
        return None
    info = os.stat(uri)  # noqa: PTH116
    return info.st_mtime_ns, info.st_size, info.st_ino


def read_file(uri: str) -> tuple[bytes, str]:
    """Reads a whole file: its bytes and "", or nothing and the reason if the file is at fault.

    Raises:
        OSError: the storage fails.
    """
    try:
        return steadily(lambda: storage.read_bytes(uri), uri), ""
    except OSError as error:
        return b"", fault_of_file(error, uri)
