"""Calls of a storage that are repeated while it fails: most outages end within minutes."""

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
# Seconds; each is twice the one before.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
# What no waiting mends: no room, read only, too large.
PERMANENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class Patient(Protocol):
    """`patiently`, for so many seconds and with somebody to tell."""

    def __call__(self, do: Callable[[], T], what: str) -> T: ...


def may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later: not where there is no such file, or no room for it."""
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
        what: fails, for messages: "the checkpoints in s3://… can't be read".
        seconds: after which it gives up.
        say: is told, once, what fails and for how long it will be tried again.
        may_pass: whether waiting can mend an error.

    Raises:
        Outage: it did not succeed in that time.
        Exception: what `do` raised, where no waiting mends it.
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
    """The file system of a URI for those who want pyarrow's interface, and the path in it.

    Ray Train's controller ends with the first call of it that fails.
    """
    fs, path = open_fs(uri)
    if isinstance(fs, LocalFileSystem):
        return pyarrow.fs.LocalFileSystem(), path
    options = {**fs.storage_options, "use_listings_cache": False}
    return pyarrow.fs.PyFileSystem(_Handler(type(fs)(**options), patient)), path


class _Handler(pyarrow.fs.FSSpecHandler):
    """fsspec for pyarrow: every call is patient, files are small, and a folder is deleted by its own name."""

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
    """A file that is handed on whole when it is closed."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        super().__init__()
        self._write = write

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            self._write(data)
