"""Files wherever they are: local paths, s3://, gs://, hf:// and the rest, through fsspec."""

import contextlib
import hashlib
import json
import os
import posixpath
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import pyarrow.fs
from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import InputError

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "huggingface_hub", "httpx")
_AGES = ("size", "mtime", "ETag", "LastModified", "etag", "updated", "blob_id")
_READ_TOGETHER = 32


def open_fs(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it.

    Raises:
        InputError: a scheme that nothing installed can open.
    """
    try:
        fs, path = fsspec.core.url_to_fs(os.path.expanduser(uri))  # noqa: PTH111  (may be a URI)
    except ImportError as error:
        scheme = uri.partition(":")[0]
        extra = f": pip install 'ray-ddpm[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else ""
        raise InputError(
            f"{uri}: {scheme}:// needs a package that is not installed{extra} ({error})"
        ) from None
    except ValueError as error:
        raise InputError(f"{uri}: {' '.join(str(error).split())}") from None
    return fs, path


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


def exists(uri: str) -> bool:
    """Whether there is a file or a folder.

    Raises:
        InputError: the storage can't say.
    """
    fs, path = open_fs(uri)
    fs.invalidate_cache()  # others write there too
    try:
        if has_magic(path):
            return bool(fs.glob(path))
        fs.info(path)  # its `exists` takes every failure for a no
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except Exception as error:  # every store has its own errors: no credentials, no network, no such bucket
        raise InputError(f"{uri}: can't be read: {_line(error)}") from None


def read_bytes(uri: str) -> bytes:
    """A whole file."""
    fs, path = open_fs(uri)
    data: bytes = fs.cat_file(path)
    return data


def read_many(uris: list[str]) -> dict[str, bytes]:
    """Whole small files, many at a time; those that can't be read are left out."""

    def read(uri: str) -> bytes | None:
        try:
            return read_bytes(uri)
        except OSError:
            return None

    with ThreadPoolExecutor(_READ_TOGETHER) as pool:
        return {uri: data for uri, data in zip(uris, pool.map(read, uris), strict=True) if data is not None}


def sizes(uri: str) -> dict[str, int]:
    """Bytes of every file below a folder, by URI, from one listing; nothing where there is no such folder."""
    fs, path = open_fs(uri)
    fs.invalidate_cache()
    found = fs.find(path, detail=True)
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


def create(uri: str, data: bytes) -> bool:
    """Writes a file only where there is none; whether it did. Atomic where the store can: S3 and GCS can."""
    fs, path = open_fs(uri)
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def remove_folder(uri: str) -> None:
    """Deletes a folder and all that is in it; one that isn't there is fine."""
    fs, path = open_fs(uri)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


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


def list_files(uri: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Every file below a folder, or that a pattern with * matches, sorted, as URIs that `open_fs` takes.

    Raises:
        InputError: there is no such folder, or it can't be read.
    """
    fs, path = open_fs(uri)
    fs.invalidate_cache()  # others write there too
    try:
        if has_magic(path):
            found = sorted(fs.glob(path))
        else:
            found = [path] if fs.isfile(path) else sorted(fs.find(path))
            if not found and not fs.exists(path):
                raise InputError(f"{uri}: no such file or folder")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{uri}: can't be read: {_line(error)}") from None
    wanted = [name for name in found if not suffixes or name.lower().endswith(suffixes)]
    return wanted if isinstance(fs, LocalFileSystem) else [fs.unstrip_protocol(name) for name in wanted]


def signature(uri: str) -> str:
    """A hash of the names, sizes and ages of the files that `list_files` gives: another one when any was changed."""
    fs, path = open_fs(uri)
    found = fs.glob(path, detail=True) if has_magic(path) else fs.find(path, detail=True)
    kept = [[name, *(str(info.get(key)) for key in _AGES)] for name, info in sorted(found.items())]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def is_storage_error(error: Exception) -> bool:
    """Whether the storage is at fault for what was raised, and not the bytes that it gave."""
    if isinstance(error, OSError):  # pyarrow raises a bare OSError for damaged bytes
        return type(error) is not OSError or error.errno is not None
    return type(error).__module__.partition(".")[0] in _CLIENTS


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def arrow_fs(uri: str) -> tuple[Any, str]:
    """The same file system for those who want pyarrow's interface, and the path in it."""
    fs, path = open_fs(uri)
    if isinstance(fs, LocalFileSystem):
        return pyarrow.fs.LocalFileSystem(), path
    options = {**fs.storage_options, "use_listings_cache": False}
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(type(fs)(**options))), path


def list_folders(uri: str, prefix: str) -> list[str]:
    """The folders straight below one whose names begin with `prefix`, sorted."""
    fs, path = open_fs(uri)
    fs.invalidate_cache()
    if not fs.exists(path):
        return []
    found = [
        posixpath.basename(e["name"].rstrip("/"))
        for e in fs.ls(path, detail=True)
        if e["type"] == "directory"
    ]
    return [join(uri, folder) for folder in sorted(found) if folder.startswith(prefix)]


def check_writable(uri: str) -> None:
    """Whether a folder can be made and written to; leaves nothing behind.

    Raises:
        InputError: it can't, and why.
    """
    fs, path = open_fs(uri)
    if isinstance(fs, LocalFileSystem):
        there = path
        while not os.path.exists(there):  # noqa: PTH110
            there = posixpath.dirname(there)
        if not os.path.isdir(there):  # noqa: PTH112
            raise InputError(f"--output {uri}: {there} is a file, not a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"--output {uri}: no permission to write in {there}")
        return
    probe = join(path, f".writable-{uuid.uuid4().hex}")
    try:
        fs.pipe_file(probe, b"")
        fs.rm_file(probe)
    except Exception as error:  # every store has its own errors
        raise InputError(f"--output {uri}: can't be written: {' '.join(str(error).split())[:200]}") from None
