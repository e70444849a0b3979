"""Caches byte ranges of remote files on a node's disk, for all of its processes. A second epoch then needs no network.

Each range is a file of its own, named by a hash of what it holds, because a node reads only parts of the files of a
large dataset. A file is written under another name, renamed, and ends with a checksum, because a process may be
killed at any moment.

A run reads each range once an epoch, each time in another order, so a range that was read last is needed last. A
cached file therefore stays until it was not used for a day. With room for half of the data, that saves half of the
reading. Keeping the most recently used files would save an eighth.

fsspec's own caches do not fit: they grow without bound, and either keep whole files or are not made for several
processes.
"""

import contextlib
import fcntl
import hashlib
import os
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_FOLDER, _BYTES = "RAY_DDPM_CACHE_DIR", "RAY_DDPM_CACHE_BYTES"  # environment variables
_PARTIAL, _LOCK = ".partial", "lock"
_CHECKSUM = 4  # bytes
_STALE = 86_400.0  # seconds without a use, after which a file may be removed
_ABANDONED = 3600.0  # seconds after which a partial file counts as left by a killed process
_PERIOD = 60.0  # seconds in which several uses of a file count as one
# As shares of the room: what a process writes before it checks the size, and the size to shrink to.
_UNSEEN, _LEFT = 1 / 128, 7 / 8


def environment(folder: str, gigabytes: float) -> dict[str, str]:
    """Environment variables that make processes use the cache; empty without a folder.

    Args:
        folder: folder of the cache on each node; "" = no cache.
        gigabytes: room for it, in 10^9 bytes.
    """
    return {_FOLDER: str(Path(folder).absolute()), _BYTES: str(int(gigabytes * 1e9))} if folder else {}


def is_used() -> bool:
    """True if this process caches what it reads."""
    return _cache() is not None


def kept(what: str, size: int, fetch: Callable[[], bytes]) -> bytes:
    """Bytes from this node's disk, or else fetched and cached there.

    Args:
        what: name of the bytes. Different bytes must have different names.
        size: number of bytes. If `fetch` returns another number, the result is not cached.
    """
    cache = _cache()
    if cache is None or not 0 < size <= cache.room * _UNSEEN:
        return fetch()
    name = hashlib.sha256(what.encode(errors="surrogateescape")).hexdigest()
    path = cache.folder / name[:2] / name
    if (data := _read(path, size)) is None:
        data = fetch()
        if len(data) == size:
            cache.write(path, data)
    return data


def _read(path: Path, size: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            stored = file.read()
            age = time.time() - os.fstat(file.fileno()).st_mtime
        data = stored[:-_CHECKSUM]
        if len(data) != size or _checksum(data) != stored[-_CHECKSUM:]:
            return None  # damaged: it will be written again
        if age > _PERIOD:
            os.utime(path)
    except OSError:  # it isn't there, or was just removed
        return None
    return data


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM, "big")


@dataclass
class _Cache:
    """The cache's folder, and the bytes that this process wrote since it last checked the size.

    Attributes:
        room: most bytes in the folder.
        unseen: bytes written since the last check.
        is_full: True if the last check found no room for more.
    """

    folder: Path
    room: int
    unseen: int
    lock: threading.Lock
    is_full: bool = False

    def write(self, path: Path, data: bytes) -> None:
        """Writes one file. If the disk is full or gone, nothing is cached, and reading goes on over the network."""
        with self.lock:
            self.unseen += len(data)
            look = self.unseen >= self.room * _UNSEEN
            self.unseen = 0 if look else self.unseen
        if look:
            with contextlib.suppress(OSError):
                self.shrink()
        if self.is_full:
            return
        partial = path.with_name(f"{uuid.uuid4().hex}{_PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data + _checksum(data))
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def shrink(self) -> None:
        """Removes files, the longest unused first: stale files down to 7/8 of the room, others down to the room."""
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # only one process at a time looks and removes
            found = list[tuple[float, int, str]]()
            for folder in filter(Path.is_dir, self.folder.iterdir()):
                for entry in os.scandir(folder):
                    with contextlib.suppress(OSError):
                        info = entry.stat()
                        age = time.time() - info.st_mtime
                        if not entry.name.endswith(_PARTIAL):
                            found.append((info.st_mtime, info.st_size, entry.path))
                        elif age > _ABANDONED:
                            os.unlink(entry.path)  # noqa: PTH108
            total = sum(size for _, size, _ in found)
            for used, size, path in sorted(found):
                if total <= (self.room if used > time.time() - _STALE else self.room * _LEFT):
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)  # noqa: PTH108
                total -= size
            self.is_full = total > self.room * _LEFT


@lru_cache(maxsize=1)
def _cache() -> _Cache | None:
    folder, size = os.environ.get(_FOLDER), int(os.environ.get(_BYTES, 0))
    # A new process starts as if it had written its share, because earlier ones may have died before they checked.
    return _Cache(Path(folder), size, size, threading.Lock()) if folder and size else None
