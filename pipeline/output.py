"""One driver an output.

On a local or mounted file system the kernel holds the lock: it can't be taken twice on one machine, and goes when its
process does, however that ends. For drivers on other machines, and on object stores, the lock says when its owner
was last alive; an owner that has been silent for `DEAD_SECONDS` is taken for dead. There two drivers that find the
same dead owner at the same moment both wait, and the one that wrote last goes on. Should even that fail, nothing
is lost: both write the same bytes, and each file appears whole.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipeline import storage
from pipeline.errors import InputError

DEAD_SECONDS = 60.0
BEAT_SECONDS = 10.0
SETTLE_SECONDS = 2.0
LOCK = "lock.json"


@contextlib.contextmanager
def locked(output: str) -> Iterator[None]:
    """Holds the lock of an output; it is gone afterwards.

    Raises:
        InputError: another driver that is alive holds it.
    """
    place = storage.join(output, LOCK)
    hold = _local if storage.is_local(output) else _remote
    with hold(output, place):
        yield


@contextlib.contextmanager
def _local(output: str, place: str) -> Iterator[None]:
    file = _open_locked(output, place)
    try:
        _refuse_if_alive(output, file.read().encode(), elsewhere_only=True)
    except InputError:
        file.close()
        raise
    try:

        def beat() -> None:
            # In place: a new file under this name would not be the one that the kernel has locked.
            content = json.dumps(_content(""))
            file.seek(0)
            file.write(content)
            file.truncate()
            file.flush()

        with _beating(beat):
            yield
    finally:
        # While it is still locked, so that nobody else's can be meant.
        Path(place).unlink(missing_ok=True)
        file.close()


def _open_locked(output: str, place: str) -> IO[str]:
    """The lock's file, locked by the kernel where the file system can."""
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.fdopen(os.open(place, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            content = file.read().encode()
            file.close()
            raise _refusal(output, _parsed(content)) from None
        except OSError:
            return file  # a file system without locks: the times in the file have to do
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == Path(place).stat().st_ino:
                return file
        # Its last owner removed the file between our opening and our locking it.
        file.close()


@contextlib.contextmanager
def _remote(output: str, place: str) -> Iterator[None]:
    owner = uuid.uuid4().hex

    def beat() -> None:
        storage.write_atomic(place, json.dumps(_content(owner)).encode())

    if not storage.create(place, json.dumps(_content(owner)).encode()):
        with contextlib.suppress(FileNotFoundError):
            _refuse_if_alive(output, storage.read_bytes(place), elsewhere_only=False)
        beat()
        time.sleep(SETTLE_SECONDS)
        lock = _parsed(storage.read_bytes(place))
        if lock.get("owner") != owner:
            raise _refusal(output, lock)
    try:
        with _beating(beat):
            yield
    finally:
        with contextlib.suppress(OSError):
            if _parsed(storage.read_bytes(place)).get("owner") == owner:
                storage.remove(place)


def _refuse_if_alive(output: str, content: bytes, *, elsewhere_only: bool) -> None:
    lock = _parsed(content)
    here = lock.get("host") == socket.gethostname()
    if here and (elsewhere_only or not Path(f"/proc/{lock.get('pid')}").exists()):
        return
    if time.time() - lock.get("time", 0.0) < DEAD_SECONDS:
        raise _refusal(output, lock)


def _refusal(output: str, lock: dict[str, Any]) -> InputError:
    return InputError(
        f"--output {output} is being written by process {lock.get('pid', '?')} on {lock.get('host', '?')}: wait for "
        "it, or choose another folder"
    )


def _content(owner: str) -> dict[str, Any]:
    return {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}


def _parsed(content: bytes) -> dict[str, Any]:
    """A lock's content; nothing where it is damaged."""
    with contextlib.suppress(ValueError):
        if isinstance(lock := json.loads(content), dict):
            return lock
    return {}


@contextlib.contextmanager
def _beating(beat: Any) -> Iterator[None]:
    """Calls `beat` now and every few seconds, from a thread; a beat that fails is only late."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                beat()

    beat()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
