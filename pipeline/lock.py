"""One driver an output: `lock.json` in the folder.

On a disk the kernel holds the lock, and it goes with its process, however that ends. Elsewhere it is a lease: its owner
renews it, and when it has expired another driver takes it over. Both takings are conditional, so of many drivers one
succeeds. An owner that finds its lock taken over stops at once.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from pipeline import storage
from pipeline.errors import InputError

LEASE_SECONDS = 60.0
RENEW_SECONDS = 10.0
POLL_SECONDS = 1.0
LOCK = "lock.json"


class LeaseLost(InputError):
    """Another driver has taken over the output; this one must not write there any more."""


@contextlib.contextmanager
def locked(output: str) -> Iterator[None]:
    """Holds the lock of an output, waiting for an expired one; it is gone afterwards.

    Raises:
        InputError: another driver that is alive holds it.
        LeaseLost: another driver took it over. In the main thread it is raised wherever the program is.
    """
    place = storage.join(output, LOCK)
    with contextlib.ExitStack() as stack:
        lock: _Local | _Remote
        if storage.is_local(output):
            lock = _Local(place, stack.enter_context(_flocked(output, place)))
        else:
            lock = _Remote(place)
        _take(output, lock)
        try:
            with _renewed(output, lock):
                yield
        finally:
            lock.release()


class _Local:
    """The lock as a file that the kernel has locked. It tells other machines, whose kernels may not know, too."""

    def __init__(self, place: str, file: IO[str]) -> None:
        self._place, self._file = place, file

    def other(self) -> dict[str, Any]:
        """What another machine's driver wrote; this machine's are gone, since the kernel gave us the file."""
        lock = _parsed(Path(self._place).read_bytes())
        return {} if _is_here(lock) else lock

    def take(self, dead: dict[str, Any]) -> bool:
        return self.renew()

    def renew(self) -> bool:
        """Whether it still is ours."""
        if not _same_file(self._file, self._place):
            return False
        # In place: a new file under this name would not be the one that the kernel has locked.
        self._file.seek(0)
        self._file.write(_content("").decode())
        self._file.truncate()
        self._file.flush()
        return True

    def release(self) -> None:
        """While it is still locked, so that nobody else's can be meant."""
        if _same_file(self._file, self._place):
            Path(self._place).unlink(missing_ok=True)


class _Remote:
    """The lock as a file on an object store."""

    def __init__(self, place: str) -> None:
        self._place, self._owner = place, uuid.uuid4().hex

    def other(self) -> dict[str, Any]:
        """What the present owner wrote; nothing where there is none, or it was a process of this machine that is gone."""
        lock, _ = self._read()
        gone = _is_here(lock) and lock.get("pids", _pids()) == _pids() and not psutil.pid_exists(lock["pid"])
        return {} if gone else lock

    def take(self, seen: dict[str, Any]) -> bool:
        """Takes a free lock, or a dead owner's; of many who try, one does."""
        lock, version = self._read()
        if version is None:
            return storage.create(self._place, _content(self._owner))
        if seen and lock != seen:
            return False
        # Some stores ignore the condition: there the one that wrote last has it.
        return storage.replace(self._place, _content(self._owner), version) and self._is_ours(self._read()[0])

    def renew(self) -> bool:
        """Whether it still is ours."""
        lock, version = self._read()
        return self._is_ours(lock) and storage.replace(self._place, _content(self._owner), version or "")

    def release(self) -> None:
        with contextlib.suppress(Exception):  # it expires by itself
            if self._is_ours(self._read()[0]):
                storage.remove(self._place)

    def _is_ours(self, lock: dict[str, Any]) -> bool:
        return lock.get("owner") == self._owner

    def _read(self) -> tuple[dict[str, Any], str | None]:
        try:
            content, version = storage.read_version(self._place)
        except FileNotFoundError:
            return {}, None
        return _parsed(content), version


def _take(output: str, lock: _Local | _Remote) -> None:
    """Takes the lock. An owner that may be dead has until its lease ends to show that it is not."""
    seen, since = lock.other(), time.monotonic()
    while True:
        # By the clock of who wrote it, or by ours: whichever says first that the lease has ended.
        silent = max(time.time() - seen.get("time", 0.0), time.monotonic() - since)
        if expired := silent >= LEASE_SECONDS:
            if lock.take(seen):
                return
        elif time.monotonic() - since < POLL_SECONDS:
            print(
                f"--output {output} is held by {_holder(seen)}, which may be dead: "
                f"taking over in {LEASE_SECONDS - silent:.0f} s unless it says that it is not",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(POLL_SECONDS)
        found = lock.other()
        if found and (found != seen or expired):
            raise _refusal(output, found)
        seen = found


@contextlib.contextmanager
def _flocked(output: str, place: str) -> Iterator[IO[str]]:
    """The lock's file, locked by the kernel where the file system can."""
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    while True:
        with os.fdopen(os.open(place, os.O_RDWR | os.O_CREAT, 0o644), "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _refusal(output, _parsed(file.read().encode())) from None
            except OSError:
                pass  # a file system without locks: the times in the file have to do
            # Else its last owner removed the file between our opening and our locking it.
            if _same_file(file, place):
                yield file
                return


def _same_file(file: IO[str], place: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.fstat(file.fileno()).st_ino == Path(place).stat().st_ino
    return False


@contextlib.contextmanager
def _renewed(output: str, lock: "_Local | _Remote") -> Iterator[None]:
    """Renews a lock from a thread. A storage that is away only delays that: nobody else can take the lock there."""
    done, lost = threading.Event(), threading.Event()
    main = threading.current_thread() is threading.main_thread()

    def hear(number: int, frame: FrameType | None) -> None:
        raise LeaseLost(
            f"--output {output} was taken over by another driver while this one was silent: it stops here, the other "
            "one goes on"
        )

    def run() -> None:
        while not done.wait(RENEW_SECONDS):
            # Object stores raise errors of their own kinds.
            with contextlib.suppress(Exception):
                if not lock.renew():
                    lost.set()
                    if main:
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                    return

    former = signal.signal(signal.SIGUSR2, hear) if main else None
    thread = threading.Thread(target=run, daemon=True, name="lease")
    thread.start()
    try:
        yield
        if lost.is_set():
            hear(0, None)
    finally:
        done.set()
        thread.join()
        if main:
            signal.signal(signal.SIGUSR2, former or signal.SIG_DFL)


def _refusal(output: str, lock: dict[str, Any]) -> InputError:
    return InputError(
        f"--output {output} is being written by {_holder(lock)}: wait for it, or choose another folder"
    )


def _holder(lock: dict[str, Any]) -> str:
    return f"process {lock.get('pid', '?')} on {lock.get('host', '?')}"


def _content(owner: str) -> bytes:
    content = {
        "owner": owner,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pids": _pids(),
        "pid": os.getpid(),
        "time": time.time(),
    }
    return json.dumps(content).encode()


def _is_here(lock: dict[str, Any]) -> bool:
    """Whether a process under this machine's kernel wrote it; 0.1.0 knew machines by name."""
    if "machine" in lock:
        return bool(lock["machine"] == _machine())
    return bool(lock.get("host") == socket.gethostname())


def _machine() -> str:
    """This start of the kernel: containers share it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _pids() -> str:
    """Where process ids mean the same: not in another container."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _parsed(content: bytes) -> dict[str, Any]:
    """A lock's content; nothing where it is damaged."""
    with contextlib.suppress(ValueError):
        if isinstance(lock := json.loads(content), dict):
            return lock
    return {}
