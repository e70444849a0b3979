"""Files on any storage, through fsspec: local paths, s3://, gs://, hf:// and others."""

import contextlib
import errno
import os
import posixpath
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from glob import escape, has_magic
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from pipeline.errors import InputError, Outage
from pipeline.redact import one_line, redact

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "huggingface_hub", "httpx", "httpx2")
_SCHEME = re.compile(r"([A-Za-z][\w+.:-]*)://")
_READ_TOGETHER = 32
# By default botocore opens only ten connections, and threads would wait for each other.
_CONNECTIONS = {"max_pool_connections": _READ_TOGETHER}
# The only errors that mean that something does not exist.
_ABSENT = (FileNotFoundError, NotADirectoryError)


class StorageError(Outage):
    """The storage can't answer at the moment."""


@contextlib.contextmanager
def reporting(what: str, advice: str = "") -> Iterator[None]:
    """Turns an error of the storage, such as a full disk, into one line: what fails, why, and what to do.

    Raises:
        Outage: the storage failed in the block. Other errors stay as they are.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # object stores raise errors of their own
        if not is_storage_error(error):
            raise
        raise Outage(f"{what}: {getattr(error, 'strerror', None) or one_line(error)}{advice}") from None


def open_fs(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI, and the path in it.

    Raises:
        InputError: no installed package opens this scheme.
    """
    if uri.startswith("~"):  # the home folder, unless a file here has this name
        uri = os.path.abspath(uri) if os.path.lexists(uri) else os.path.expanduser(uri)  # noqa: PTH100, PTH111
    scheme = found[1] if (found := _SCHEME.match(uri)) else "file"
    try:
        if scheme not in ("file", *_EXTRAS):
            return fsspec.core.url_to_fs(uri)
        # url_to_fs would take `::` in a name for a chain of file systems.
        kind = fsspec.get_filesystem_class(scheme)
        options = kind._get_kwargs_from_urls(uri)
        if scheme in ("s3", "s3a"):
            set_by_user = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            options["config_kwargs"] = _CONNECTIONS | set_by_user
        return kind(**options), kind._strip_protocol(uri)
    except ImportError as error:
        extra = f": pip install 'ray-ddpm[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else ""
        raise InputError(
            f"{uri}: {scheme}:// needs a package that is not installed{extra} ({error})"
        ) from None
    except ValueError as error:
        raise InputError(f"{uri}: {one_line(error)}") from None


def join(uri: str, *parts: str) -> str:
    """The URI with further path components."""
    return posixpath.join(uri.rstrip("/") or "/", *parts)


def name(uri: str) -> str:
    """The last component of a URI."""
    return posixpath.basename(uri.rstrip("/"))


def title(uri: str) -> str:
    """A name for data that other people may read, as in MLflow or a card: a remote address, or a path's last component.

    A local path means nothing to others, and may reveal on whose machine it is.
    """
    if not is_local(uri):
        return redact(uri)
    folder, pattern = pattern_of(uri) or (absolute(uri), "")
    return join(name(folder), pattern) if pattern else name(folder)


def absolute(uri: str) -> str:
    """The absolute form of a local path, so that other processes on the machine find it; other URIs unchanged."""
    fs, path = open_fs(uri)
    return path if isinstance(fs, LocalFileSystem) else uri


def is_local(uri: str) -> bool:
    """True if a URI is a path on this machine's file systems, shared ones included."""
    return isinstance(open_fs(uri)[0], LocalFileSystem)


def exists(uri: str, pattern: bool = False) -> bool:
    """True if a file or folder of exactly this name exists.

    Args:
        pattern: also accept a pattern that matches some file or folder, as `list_files` does.

    Raises:
        StorageError: the storage can't answer.
    """
    fs, path = open_fs(uri)
    fs.invalidate_cache()  # other processes write there too
    if found := pattern_of(uri):
        with _asking(uri):
            return pattern and bool(_glob(fs, found))
    with _asking(uri):
        return _kind(fs, path) is not None


def _kind(fs: Any, path: str) -> str | None:
    """The kind of entry at a path: "file", "directory" or "other"; None if there is none."""
    try:
        return str(fs.info(path)["type"])  # fsspec's `exists` returns False on every failure
    except _ABSENT:
        return None


def _find(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """Every file below a folder, with details; empty if the folder does not exist."""
    if not isinstance(fs, LocalFileSystem):
        try:
            return dict(fs.find(path, detail=True))
        except _ABSENT:
            return {}
    found, folders = dict[str, dict[str, Any]](), [path]
    while folders:  # on disks, fsspec's `find` silently skips folders that it can't list
        with contextlib.suppress(*_ABSENT):
            for entry in fs.ls(folders.pop(), detail=True):
                if entry["type"] == "directory":
                    folders.append(entry["name"])
                else:
                    found[entry["name"]] = entry
    return dict(sorted(found.items()))


def pattern_of(uri: str) -> tuple[str, str] | None:
    """Splits a path that is a pattern into the folder before the first component with *, ? or [], and the rest.

    Returns:
        None for other paths, and for a path that exists with these very characters.

    Raises:
        StorageError: the storage can't answer.
    """
    fs, path = open_fs(uri)
    with _asking(uri):
        for name in re.finditer("[^/]+", path):
            if has_magic(name[0]) and _kind(fs, path[: name.end()]) is None:
                folder = path[: name.start()]
                return folder.rstrip("/") or folder, path[name.start() :]
    return None


def _glob(fs: Any, pattern: tuple[str, str]) -> dict[str, dict[str, Any]]:
    """Everything that a pattern matches, with details; see `pattern_of`."""
    return dict(fs.glob(posixpath.join(escape(pattern[0]), pattern[1]), detail=True))


def matcher(pattern: str) -> Callable[[str], bool]:
    """Returns a function that is True for a name that matches a pattern, or that lies in a folder that matches.

    Raises:
        InputError: the pattern is not valid.
    """
    try:
        match = re.compile(glob_translate(pattern)).match
    except ValueError as error:
        raise InputError(f"{pattern}: {one_line(error)}") from None
    return lambda name: any(match(name[: end.start()]) for end in re.finditer("/|$", name))


@contextlib.contextmanager
def _asking(uri: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # stores raise errors of their own: no credentials, no network, no such bucket
        raise StorageError(f"{uri}: can't be read: {one_line(error)}") from None


def read_bytes(uri: str) -> bytes:
    """The content of a file."""
    fs, path = open_fs(uri)
    data: bytes = fs.cat_file(path)
    return data


def read_many(uris: list[str]) -> dict[str, bytes]:
    """The contents of small files, read many at a time. Files that do not exist are left out.

    Raises:
        StorageError: a file can't be read.
    """

    def read(uri: str) -> bytes | None:
        with _asking(uri):
            try:
                return read_bytes(uri)
            except _ABSENT:
                return None

    with ThreadPoolExecutor(_READ_TOGETHER) as pool:
        return {uri: data for uri, data in zip(uris, pool.map(read, uris), strict=True) if data is not None}


def sizes(uri: str) -> dict[str, int]:
    """Size in bytes of every file below a folder, by URI, from one listing; empty if the folder does not exist.

    Raises:
        StorageError: the folder can't be read.
    """
    fs, path = open_fs(uri)
    fs.invalidate_cache()
    with _asking(uri):
        found = _find(fs, path)
    local = isinstance(fs, LocalFileSystem)
    return {name if local else fs.unstrip_protocol(name): int(info["size"]) for name, info in found.items()}


def remove(uri: str) -> None:
    """Deletes one file."""
    fs, path = open_fs(uri)
    fs.rm_file(path)


def move(uri: str, to: str) -> None:
    """Renames a file within one store."""
    fs, path = open_fs(uri)
    target = open_fs(to)[1]
    if isinstance(fs, LocalFileSystem):
        fs.makedirs(posixpath.dirname(target), exist_ok=True)
        fs.mv(path, target)
    else:
        fs.cp_file(path, target)  # fsspec's `mv` takes names for patterns
        fs.rm_file(path)


def create(uri: str, data: bytes) -> bool:
    """Writes a file if it does not exist yet, and returns True if it did. Atomic on S3 and GCS."""
    fs, path = open_fs(uri)
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def read_version(uri: str) -> tuple[bytes, str]:
    """The content of a file, and its version for `replace` ("" if the store has no versions)."""
    fs, path = open_fs(uri)
    fs.invalidate_cache()
    # The version is read first. If the file changes before the content is read, `replace` notices it.
    version = str(fs.info(path).get("ETag", ""))
    return fs.cat_file(path), version


def replace(uri: str, data: bytes, version: str) -> bool:
    """Overwrites a file if it still has that version, and returns True if it did. Atomic only on S3."""
    if not version:
        write_atomic(uri, data)
        return True
    fs, path = open_fs(uri)
    try:
        fs.pipe_file(path, data, IfMatch=version)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.EINVAL:  # s3fs raises EINVAL if the condition does not hold
            raise
        return False
    return True


def remove_folder(uri: str) -> None:
    """Deletes a folder with everything in it. A folder that does not exist is fine."""
    fs, path = open_fs(uri)
    with contextlib.suppress(FileNotFoundError):
        # fsspec takes names for patterns on stores, and its cache may lack files that others wrote.
        fs.invalidate_cache()
        fs.rm(path if isinstance(fs, LocalFileSystem) else escape(path), recursive=True)


def write_atomic(uri: str, data: bytes) -> None:
    """Writes a file that appears whole or not at all: by a rename on disks, by a single put on object stores."""
    fs, path = open_fs(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    with writing(uri) as file:
        file.write(data)


@contextlib.contextmanager
def writing(uri: str) -> Iterator[IO[bytes]]:
    """Yields a file to write, of any length, that appears whole or not at all.

    For an object store the file is first written on this machine's disk.
    """
    fs, path = open_fs(uri)
    if not isinstance(fs, LocalFileSystem):
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            fs.put_file(file.name, path)
        return
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        with open(partial, "wb") as file:  # noqa: PTH123
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)  # noqa: PTH105
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)  # noqa: PTH108
        raise


def list_details(uri: str) -> dict[str, dict[str, Any]]:
    """Lists a file, every file below a folder, or both for each match of a pattern.

    Returns:
        the storage's details of each file (at least `size`), by its path in the file system of `open_fs`.

    Raises:
        InputError: nothing of that name exists, or it can't be read.
    """
    fs, path = open_fs(uri)
    fs.invalidate_cache()  # other processes write there too
    pattern = pattern_of(uri)
    with _asking(uri):
        if pattern:
            matches = _glob(fs, pattern)
        elif kind := _kind(fs, path):
            matches = {path: {"type": kind} if kind != "file" else fs.info(path)}
        else:
            matches = {}
        if not matches:
            raise InputError(f"{uri}: no such file or folder")
        found = {name: info for name, info in matches.items() if info["type"] != "directory"}
        for folder in matches.keys() - found.keys():
            if not any(str(above) in matches for above in PurePosixPath(folder).parents):
                found |= _find(fs, folder)
        return found


def list_folder(uri: str) -> dict[str, dict[str, Any]]:
    """The storage's details of each file directly in a folder, by name.

    Raises:
        StorageError: the folder can't be read.
    """
    fs, path = open_fs(uri)
    with _asking(uri):
        return {name(e["name"]): e for e in fs.ls(path, detail=True) if e["type"] != "directory"}


def list_files(uri: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """The URIs of the files that `list_details` finds, sorted.

    Args:
        suffixes: list only names that end in one of these, in upper or lower case.

    Raises:
        InputError: as `list_details`.
    """
    fs = open_fs(uri)[0]
    found = sorted(list_details(uri))
    wanted = with_suffix(found, *suffixes) if suffixes else found
    return wanted if isinstance(fs, LocalFileSystem) else [fs.unstrip_protocol(name) for name in wanted]


def with_suffix(files: list[str], *suffixes: str) -> list[str]:
    """The files whose names end in one of these, in upper or lower case."""
    return [file for file in files if file.lower().endswith(suffixes)]


def is_storage_error(error: Exception) -> bool:
    """True if an error is the fault of the storage and not of the bytes that it returned."""
    if isinstance(error, OSError):  # pyarrow raises a bare OSError for damaged bytes
        return type(error) is not OSError or error.errno is not None
    return type(error).__module__.partition(".")[0] in _CLIENTS


def list_folders(uri: str, prefix: str) -> list[str]:
    """The folders directly in a folder whose names begin with `prefix`, sorted; empty if the folder does not exist.

    Raises:
        StorageError: the folder can't be read.
    """
    fs, path = open_fs(uri)
    fs.invalidate_cache()
    with _asking(uri):
        try:
            entries = fs.ls(path, detail=True)
        except _ABSENT:
            return []
    found = [name(e["name"]) for e in entries if e["type"] == "directory"]
    return [join(uri, folder) for folder in sorted(found) if folder.startswith(prefix)]


def check_writable(uri: str) -> None:
    """Checks that a folder can be created and written to, and leaves nothing behind.

    Raises:
        InputError: it can't; the message says why.
    """
    fs, path = open_fs(uri)
    if isinstance(fs, LocalFileSystem):
        there = path
        with _asking(f"--output {uri}"):
            while (kind := _kind(fs, there)) is None:
                there = posixpath.dirname(there)
        if kind != "directory":
            raise InputError(f"--output {uri}: {there} is a file, not a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"--output {uri}: no permission to write in {there}")
        return
    probe = join(path, f".writable-{uuid.uuid4().hex}")
    try:
        fs.pipe_file(probe, b"")
        fs.rm_file(probe)
    except Exception as error:  # stores raise errors of their own
        raise InputError(f"--output {uri}: can't be written: {one_line(error)}") from None
