"""Stretches of remote files, kept on a node's disk for all of its processes: a second epoch does without the network.

Each stretch is a file of its own, named after what it holds: stretches are what is fetched, and of a large dataset a node
sees a part of each file. A file is written under another name and renamed, and ends with a checksum: a process may be
killed at any moment.

A run reads each stretch once an epoch, in another order each time: of what there is no room for, what was read last is
needed last. So what is there stays, until it was not used for a day; room for half of the data then saves half of the
reading, where room for what was used last would save an eighth.

fsspec's caches grow without bound, and either keep whole files or are not made for several processes.
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

_FOLDER, _BYTES = "RAY_DDPM_CACHE_DIR", "RAY_DDPM_CACHE_BYTES"  # variables of the processes that read
_PARTIAL, _LOCK = ".partial", "lock"
_CHECKSUM = 4  # bytes
_STALE = 86_400.0  # seconds without a use
_ABANDONED = 3600.0  # seconds after which a file that was begun is taken for that of a killed process
_PERIOD = 60.0  # seconds in which uses of a file count as one
# Shares of the room: what a process writes before it looks for what is too much, and what is kept.
_UNSEEN, _LEFT = 1 / 128, 7 / 8


def environment(folder: str, gigabytes: float) -> dict[str, str]:
    """Variables with which processes keep what they read; none where no folder is given."""
    return {_FOLDER: str(Path(folder).absolute()), _BYTES: str(int(gigabytes * 1e9))} if folder else {}


def is_used() -> bool:
    """Whether this process keeps what it reads."""
    return _cache() is not None


def kept(what: str, size: int, fetch: Callable[[], bytes]) -> bytes:
    """Bytes that are on this node's disk, or are fetched and kept there.

    Args:
        what: names them: other bytes have another name.
        size: of them; a stretch of another size is fetched, and not kept.
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
            return None  # is written anew
        if age > _PERIOD:
            os.utime(path)
    except OSError:  # it isn't there, or has just been removed
        return None
    return data


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM, "big")


@dataclass
class _Cache:
    """The folder, and how much of it this process has filled since it last looked for what is too much."""

    folder: Path
    room: int
    unseen: int
    lock: threading.Lock
    is_full: bool = False

    def write(self, path: Path, data: bytes) -> None:
        """A disk that is full or away costs nothing but the time of the network."""
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
        """Removes what was not used for a day, and what there is no room for."""
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # others that write wait: the room is never exceeded
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
    # As if this process had filled its share: those before it may have been killed before they looked.
    return _Cache(Path(folder), size, size, threading.Lock()) if folder and size else None
