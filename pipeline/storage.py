"""Files wherever they are: local paths, s3://, gs://, hf:// and the rest, through fsspec."""

import contextlib
import errno
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from glob import escape, has_magic
from pathlib import PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from pipeline.errors import InputError, Outage
from pipeline.redact import one_line

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "huggingface_hub", "httpx", "httpx2")
_SCHEME = re.compile(r"([A-Za-z][\w+.:-]*)://")
_READ_TOGETHER = 32
# Else botocore opens ten, and threads wait for each other.
_CONNECTIONS = {"max_pool_connections": _READ_TOGETHER}
# The only errors that say that something is not there.
_ABSENT = (FileNotFoundError, NotADirectoryError)


class StorageError(Outage):
    """The storage can't say now what it is asked."""


def open_fs(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it.

    Raises:
        InputError: a scheme that nothing installed can open.
    """
    if uri.startswith("~"):  # the home folder, unless something here is called so
        uri = os.path.abspath(uri) if os.path.lexists(uri) else os.path.expanduser(uri)  # noqa: PTH100, PTH111
    scheme = found[1] if (found := _SCHEME.match(uri)) else "file"
    try:
        if scheme not in ("file", *_EXTRAS):
            return fsspec.core.url_to_fs(uri)
        # Not url_to_fs: it takes `::` in a name for a chain of file systems.
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
    """A URI further down."""
    return posixpath.join(uri.rstrip("/") or "/", *parts)


def name(uri: str) -> str:
    """The last part of a URI."""
    return posixpath.basename(uri.rstrip("/"))


def absolute(uri: str) -> str:
    """A local path made absolute, so that workers elsewhere on the machine find it; other URIs as they are."""
    fs, path = open_fs(uri)
    return path if isinstance(fs, LocalFileSystem) else uri


def is_local(uri: str) -> bool:
    """Whether a URI is a path on this machine's file systems (shared ones among them)."""
    return isinstance(open_fs(uri)[0], LocalFileSystem)


def exists(uri: str, pattern: bool = False) -> bool:
    """Whether there is a file or a folder of that very name.

    Args:
        pattern: also accept a pattern that matches some files or folders, as `list_files` does.

    Raises:
        InputError: the storage can't say.
    """
    fs, path = open_fs(uri)
    fs.invalidate_cache()  # others write there too
    if found := pattern_of(uri):
        with _asking(uri):
            return pattern and bool(_glob(fs, found))
    with _asking(uri):
        return _kind(fs, path) is not None


def _kind(fs: Any, path: str) -> str | None:
    """What lies there: file, directory or other."""
    try:
        return str(fs.info(path)["type"])  # its `exists` takes every failure for a no
    except _ABSENT:
        return None


def _find(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """Every file below a folder; nothing where there is none."""
    if not isinstance(fs, LocalFileSystem):
        try:
            return dict(fs.find(path, detail=True))
        except _ABSENT:
            return {}
    found, folders = dict[str, dict[str, Any]](), [path]
    while folders:  # on disks `find` leaves out what it can't list
        with contextlib.suppress(*_ABSENT):
            for entry in fs.ls(folders.pop(), detail=True):
                if entry["type"] == "directory":
                    folders.append(entry["name"])
                else:
                    found[entry["name"]] = entry
    return dict(sorted(found.items()))


def pattern_of(uri: str) -> tuple[str, str] | None:
    """A path that is a pattern, as the folder before its first name with *, ? or [] in it, and the rest.

    Returns:
        None for other paths, and for one that is there as it stands.

    Raises:
        InputError: the storage can't say.
    """
    fs, path = open_fs(uri)
    with _asking(uri):
        for name in re.finditer("[^/]+", path):
            if has_magic(name[0]) and _kind(fs, path[: name.end()]) is None:
                folder = path[: name.start()]
                return folder.rstrip("/") or folder, path[name.start() :]
    return None


def _glob(fs: Any, pattern: tuple[str, str]) -> dict[str, dict[str, Any]]:
    """What there is that a pattern matches: see `pattern_of`."""
    return dict(fs.glob(posixpath.join(escape(pattern[0]), pattern[1]), detail=True))


def matcher(pattern: str) -> Callable[[str], bool]:
    """Returns a function that says whether a pattern matches a name, or a folder in it.

    Raises:
        InputError: it is no pattern.
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
    except Exception as error:  # every store has its own errors: no credentials, no network, no such bucket
        raise StorageError(f"{uri}: can't be read: {one_line(error)}") from None


def read_bytes(uri: str) -> bytes:
    """A whole file."""
    fs, path = open_fs(uri)
    data: bytes = fs.cat_file(path)
    return data


def read_many(uris: list[str]) -> dict[str, bytes]:
    """Whole small files, many at a time; those that are not there are left out.

    Raises:
        InputError: one can't be read.
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
    """Bytes of every file below a folder, by URI, from one listing; nothing where there is no such folder.

    Raises:
        InputError: it can't be read.
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
    """Gives a file another name in the same store."""
    fs, path = open_fs(uri)
    target = open_fs(to)[1]
    if isinstance(fs, LocalFileSystem):
        fs.makedirs(posixpath.dirname(target), exist_ok=True)
        fs.mv(path, target)
    else:
        fs.cp_file(path, target)  # its `mv` takes names for patterns
        fs.rm_file(path)


def create(uri: str, data: bytes) -> bool:
    """Writes a file if there is none yet; returns whether it did. Atomic where the store can: S3 and GCS can."""
    fs, path = open_fs(uri)
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def read_version(uri: str) -> tuple[bytes, str]:
    """A whole file and its version, by which `replace` recognises it (empty where the store has no versions)."""
    fs, path = open_fs(uri)
    fs.invalidate_cache()
    # The version first: if the file changes between the two, `replace` finds that out.
    version = str(fs.info(path).get("ETag", ""))
    return fs.cat_file(path), version


def replace(uri: str, data: bytes, version: str) -> bool:
    """Overwrites a file if it still has that version; returns whether it did. Atomic on S3 alone."""
    if not version:
        write_atomic(uri, data)
        return True
    fs, path = open_fs(uri)
    try:
        fs.pipe_file(path, data, IfMatch=version)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.EINVAL:  # what s3fs makes of a condition that does not hold
            raise
        return False
    return True


def remove_folder(uri: str) -> None:
    """Deletes a folder and all that is in it; one that isn't there is fine."""
    fs, path = open_fs(uri)
    with contextlib.suppress(FileNotFoundError):
        # Stores take a name for a pattern, and may not have heard of what others wrote.
        fs.invalidate_cache()
        fs.rm(path if isinstance(fs, LocalFileSystem) else escape(path), recursive=True)


def write_atomic(uri: str, data: bytes) -> None:
    """Writes a file that appears whole or not at all: renamed locally, one put on an object store."""
    fs, path = open_fs(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        with open(partial, "wb") as file:  # noqa: PTH123
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)  # noqa: PTH105
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)  # noqa: PTH108
        raise


def list_details(uri: str) -> dict[str, dict[str, Any]]:
    """A file, every file below a folder, or, where neither is there, all of that for each match of a pattern.

    Returns:
        what the storage says of each (at least `size`), by its path in the file system that `open_fs` gives.

    Raises:
        InputError: there is none of these, or it can't be read.
    """
    fs, path = open_fs(uri)
    fs.invalidate_cache()  # others write there too
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
    """What the storage says of each file straight in a folder, by its name there.

    Raises:
        InputError: the folder can't be read.
    """
    fs, path = open_fs(uri)
    with _asking(uri):
        return {name(e["name"]): e for e in fs.ls(path, detail=True) if e["type"] != "directory"}


def list_files(uri: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """The URIs of what `list_details` finds, sorted.

    Args:
        suffixes: only names that end in one of these, in upper or lower case.

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
    """Whether the storage is at fault for what was raised, and not the bytes that it gave."""
    if isinstance(error, OSError):  # pyarrow raises a bare OSError for damaged bytes
        return type(error) is not OSError or error.errno is not None
    return type(error).__module__.partition(".")[0] in _CLIENTS


def list_folders(uri: str, prefix: str) -> list[str]:
    """The folders straight below one whose names begin with `prefix`, sorted; none where there is no such folder.

    Raises:
        InputError: it can't be read.
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
    """Whether a folder can be made and written to; leaves nothing behind.

    Raises:
        InputError: it can't, and why.
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
    except Exception as error:  # every store has its own errors
        raise InputError(f"--output {uri}: can't be written: {one_line(error)}") from None
