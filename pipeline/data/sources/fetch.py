"""Files and stretches of files, several at a time where the storage is remote; and whose fault it is if one fails."""

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
MOST_BYTES = 2**30  # of an image: more than the largest that is decoded takes
_Given = TypeVar("_Given")
_Got = TypeVar("_Got")


def in_order(call: Callable[[_Given], _Got], given: Iterable[_Given], uri: str) -> Iterator[_Got]:
    """Calls a function that reads, in the order of what is given.

    Args:
        uri: where it reads; a remote storage is asked for up to `THREADS` at a time, and is never further ahead.
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
    """Why this one file can't be read.

    Raises:
        OSError: the same error, where the storage is at fault.
    """
    if isinstance(error, FileNotFoundError):
        if storage.is_local(uri) and os.path.islink(storage.open_fs(uri)[1]):  # noqa: PTH114
            return "a link to nothing"
        return "can't be read: it is not there any more"
    if isinstance(error, PermissionError):
        return "can't be read: permission denied"
    if error.errno == errno.ELOOP:
        return "can't be read: a link that leads to itself"
    raise error


@contextlib.contextmanager
def refusing(uri: str) -> Iterator[None]:
    """Raises an InputError in place of an error that is the fault of this one file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{uri}: {fault_of_file(error, uri)}") from None


def local_stamp(uri: str) -> tuple[int, int, int] | None:
    """Differs once another file lies there; None for a remote one, of which the store would be asked for each read."""
    if not uri.startswith("/"):  # told without a file system: it is asked for every read
        return None
    info = os.stat(uri)  # noqa: PTH116
    return info.st_mtime_ns, info.st_size, info.st_ino


def read_file(uri: str) -> tuple[bytes, str]:
    """A whole file; or nothing, and the reason, which is the file's own.

    Raises:
        OSError: the storage fails.
    """
    try:
        return steadily(lambda: storage.read_bytes(uri), uri), ""
    except OSError as error:
        return b"", fault_of_file(error, uri)
