"""Repeats calls of a storage while it fails. Most outages end within minutes."""

import errno
import io
import time
from collections.abc import Callable
from glob import escape
from typing import Any, Protocol, TypeVar

import pyarrow
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import Outage
from pipeline.redact import one_line
from pipeline.storage import StorageError, is_storage_error, open_fs

T = TypeVar("T")
# Seconds between two tries; each pause is twice the one before.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
# Errors that waiting does not cure: no space, quota used up, read-only, too large.
PERMANENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class Patient(Protocol):
    """`patiently` with its time limit and its messages already chosen."""

    def __call__(self, do: Callable[[], T], what: str) -> T: ...


def may_pass(error: Exception) -> bool:
    """True if the same call may succeed later. It can't if the file does not exist or there is no room for it."""
    if isinstance(error, StorageError):
        return True
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return False
    return is_storage_error(error) and getattr(error, "errno", None) not in PERMANENT


def patiently(
    do: Callable[[], T],
    what: str,
    seconds: float,
    say: Callable[[str], object],
    may_pass: Callable[[Exception], bool] = may_pass,
) -> T:
    """Calls `do` until it succeeds.

    Args:
        what: what fails, for messages: "the checkpoints in s3://… can't be read".
        seconds: time after which it gives up.
        say: called once with a line that says what fails and how long it will be tried again.
        may_pass: returns True for an error that waiting may cure.

    Raises:
        Outage: `do` did not succeed in that time.
        Exception: the error of `do`, if waiting does not cure it.
    """
    began, pause = time.monotonic(), FIRST_PAUSE
    while True:
        try:
            return do()
        except Exception as error:
            if not may_pass(error):
                raise
            waited = time.monotonic() - began
            if waited >= seconds:
                raise Outage(f"{what}, for {waited:.0f} s now: {one_line(error)}") from error
            if pause == FIRST_PAUSE:
                say(f"{what}: {one_line(error)}; trying again for {seconds:.0f} s")
            time.sleep(min(pause, seconds - waited))
            pause = min(2 * pause, LONGEST_PAUSE)


def arrow_fs(uri: str, patient: Patient) -> tuple[Any, str]:
    """A pyarrow file system for a URI, and the path in it.

    Its calls are repeated while they fail, because Ray Train's controller ends at the first call that fails.
    """
    fs, path = open_fs(uri)
    if isinstance(fs, LocalFileSystem):
        return pyarrow.fs.LocalFileSystem(), path
    options = {**fs.storage_options, "use_listings_cache": False}
    return pyarrow.fs.PyFileSystem(_Handler(type(fs)(**options), patient)), path


class _Handler(pyarrow.fs.FSSpecHandler):
    """Adapts fsspec to pyarrow. Failing calls are repeated, files are small, and folder names are never patterns."""

    def __init__(self, fs: Any, patient: Patient) -> None:
        super().__init__(fs)
        self._patient = patient

    def _do(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        return self._patient(lambda: call(*arguments, **options), "the storage of the checkpoints fails")

    def get_file_info(self, paths: list[str]) -> Any:
        return self._do(super().get_file_info, paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return self._do(super().get_file_info_selector, selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._do(super().create_dir, path, recursive)

    def delete_dir(self, path: str) -> None:
        self.fs.invalidate_cache()
        self._do(self.fs.rm, escape(path), recursive=True)

    def delete_file(self, path: str) -> None:
        self._do(super().delete_file, path)

    def open_input_stream(self, path: str) -> Any:
        return pyarrow.PythonFile(io.BytesIO(self._do(self.fs.cat_file, path)), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pyarrow.PythonFile(
            _WrittenAtTheEnd(lambda data: self._do(self.fs.pipe_file, path, data)), mode="w"
        )


class _WrittenAtTheEnd(io.BytesIO):
    """A file in memory that is passed on whole when it is closed."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        super().__init__()
        self._write = write

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            self._write(data)
