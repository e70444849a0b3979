"""Ensures one driver for each output, by a lease in `lock.json` and, on disks, the kernel's lock of the folder.

The kernel's lock ends with its process, however that ends. The lease also works on object stores and between machines
with separate kernels. Its owner renews it, and another driver takes it over once it has expired. Both are taken
conditionally, so only one of several drivers succeeds. An owner whose lease was taken over stops at once.
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
from typing import Any

import psutil

from pipeline import storage
from pipeline.errors import Outage

LEASE_SECONDS = 60.0
RENEW_SECONDS = 10.0
POLL_SECONDS = 1.0
LOCK = "lock.json"


class LeaseLost(Outage):
    """Another driver took over the output, so this one must not write there any more."""


@contextlib.contextmanager
def locked(output: str) -> Iterator[threading.Event]:
    """Holds the lock of an output, and releases it at the end.

    Yields:
        an event that is set when another driver takes over the output.

    Raises:
        Outage: another live driver holds it, or the storage fails.
        LeaseLost: another driver took it over. In the main thread this interrupts whatever the program does.
    """
    with _folder_locked(output) as held:
        lease = _Lease(output, held)
        with storage.reporting(f"--output {output} can't be locked"):
            _take(lease)
        try:
            with _renewed(lease) as lost:
                yield lost
        finally:
            lease.release()


@contextlib.contextmanager
def _folder_locked(output: str) -> Iterator[bool]:
    """Locks a folder with the kernel if the file system supports it; yields True if it is locked."""
    if not storage.is_local(output):
        yield False
        return
    folder = Path(storage.absolute(output))
    with storage.reporting(f"--output {output} can't be locked"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(output, _Lease(output, False).read()[0]) from None
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


class _Lease:
    """The file that says who writes to an output, and when its owner last renewed it.

    Args:
        held: True if the kernel has locked the folder for this process.
    """

    def __init__(self, output: str, held: bool) -> None:
        self.output, self._held = output, held
        self._place, self._owner = storage.join(output, LOCK), uuid.uuid4().hex

    def read(self) -> tuple[dict[str, Any], str | None]:
        """The content ({} if the file is damaged) and the version (None if there is no file)."""
        try:
            content, version = storage.read_version(self._place)
        except FileNotFoundError:
            return {}, None
        with contextlib.suppress(ValueError):
            if isinstance(lock := json.loads(content), dict):
                return lock, version
        return {}, version

    def other(self) -> dict[str, Any]:
        """The content that another owner wrote, if that owner may be alive; else {}."""
        lock, _ = self.read()
        if _is_here(lock):
            by_process = lock.get("pids", _pids()) == _pids() and not psutil.pid_exists(lock.get("pid", 0))
            return {} if self._held or by_process else lock
        return lock

    def take(self, seen: dict[str, Any]) -> bool:
        """Takes a free lease, or that of a dead owner; only one of several drivers succeeds.

        Args:
            seen: the dead owner's content; the lease is not taken if it has changed since.
        """
        lock, version = self.read()
        if version is None:
            return storage.create(self._place, self._content())
        if seen and lock != seen:
            return False
        # Some stores ignore the condition. On those, the last writer has the lease.
        return storage.replace(self._place, self._content(), version) and self._is_ours(self.read()[0])

    def renew(self) -> bool:
        """Renews the lease if it is still ours, and returns True if it was."""
        lock, version = self.read()
        return self._is_ours(lock) and storage.replace(self._place, self._content(), version or "")

    def release(self) -> None:
        with contextlib.suppress(Exception):  # the lease expires by itself
            if self._is_ours(self.read()[0]):
                storage.remove(self._place)

    def _content(self) -> bytes:
        return json.dumps(_self() | {"owner": self._owner}).encode()

    def _is_ours(self, lock: dict[str, Any]) -> bool:
        return lock.get("owner") == self._owner


def _take(lease: _Lease) -> None:
    """Takes the lease. Waits until the lease of an owner that may be dead expires, unless the owner renews it."""
    seen, since = lease.other(), time.monotonic()
    while True:
        watched = time.monotonic() - since
        # The owner's clock may be wrong by minutes, so its silence counts only once it has missed two renewals.
        left = min(
            LEASE_SECONDS - watched,
            max(LEASE_SECONDS - (time.time() - seen.get("time", 0.0)), 2 * RENEW_SECONDS - watched),
        )
        if expired := not seen or left <= 0:
            if lease.take(seen):
                return
        elif watched < POLL_SECONDS:
            print(
                f"--output {lease.output} is held by {_holder(seen)}, which may be dead: "
                f"taking over in {left:.0f} s unless it renews its lease",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(POLL_SECONDS)
        found = lease.other()
        if found and (found != seen or expired):
            raise _refusal(lease.output, found)
        seen = found


@contextlib.contextmanager
def _renewed(lease: _Lease) -> Iterator[threading.Event]:
    """Renews a lease from a thread. If the storage fails, renewal is late, but nobody else can take the lease there."""
    done, lost = threading.Event(), threading.Event()
    main = threading.current_thread() is threading.main_thread()
    error = LeaseLost(
        f"--output {lease.output} was taken over by another driver while this one was silent: this driver stops, the "
        "other one continues"
    )

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise error

    def run() -> None:
        while not done.wait(RENEW_SECONDS):
            with contextlib.suppress(Exception):  # object stores raise errors of their own
                if not lease.renew():
                    lost.set()
                    if main:
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                    return

    former = signal.signal(signal.SIGUSR2, interrupt) if main else None
    thread = threading.Thread(target=run, daemon=True, name="lease")
    thread.start()
    try:
        yield lost
    except Exception:
        if lost.is_set():  # Ray's core turns an interrupt into errors of its own
            raise error from None
        raise
    finally:
        done.set()
        thread.join()
        if main:
            signal.signal(signal.SIGUSR2, former or signal.SIG_DFL)
    if lost.is_set():
        raise error


def _refusal(output: str, lock: dict[str, Any]) -> Outage:
    return Outage(  # the same command may succeed later
        f"--output {output} is being written by {_holder(lock)}: wait for it, or choose another folder"
    )


def _holder(lock: dict[str, Any]) -> str:
    return f"process {lock.get('pid', '?')} on {lock.get('host', '?')}"


def _self() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        # Identifies this boot of the kernel, which containers share.
        "machine": boot.read_text().strip() if boot.exists() else socket.gethostname(),
        "pids": _pids(),
        "pid": os.getpid(),
        "time": time.time(),
    }


def _is_here(lock: dict[str, Any]) -> bool:
    """True if a process under this machine's kernel wrote the lease. Release 0.1.0 identified machines by host name."""
    key = "machine" if "machine" in lock else "host"
    return bool(lock.get(key) == _self()[key])


def _pids() -> str:
    """The namespace of process ids, which differs between containers."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""
