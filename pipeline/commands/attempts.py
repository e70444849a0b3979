"""Ends repeated attempts of a job at once if its input is bad.

KubeRay repeats a failed job on a new cluster up to `backoffLimit` times, whatever its exit code, and bad input fails each
time. So the attempt that finds bad input leaves a note. The next attempts read it and end before they request any node.
"""

import contextlib
import hashlib
import json
import os
import time

from pipeline import storage
from pipeline.errors import InputError, Outage

FOLDER = "RAY_DDPM_REFUSALS"  # names the folder of the notes, a path or a URI; if not set, no notes are kept
FURTHER = 2  # attempts after the first: the `backoffLimit` of every job in k8s/
# Age in seconds at which a note expires. Attempts follow each other within minutes. A user who corrects the input and
# keeps the flags waits at most this long.
SECONDS = 1800.0


def refused(job: str, arguments: list[str]) -> str:
    """The line with which a recent attempt with the same flags ended; "" for a first attempt.

    The note is removed after FURTHER attempts, so a job that the user applies again starts normally.
    """
    if not (place := _place(job, arguments)):
        return ""
    try:
        note = json.loads(storage.read_bytes(place))
        line, left, age = str(note["line"]), int(note["left"]), time.time() - float(note["time"])
    except Exception:
        # There is no note, or the storage fails with an error of its own, which the job itself will report.
        return ""
    with contextlib.suppress(Exception):
        if age > SECONDS or left <= 1:
            storage.remove(place)
        else:
            storage.write_atomic(place, json.dumps({**note, "left": left - 1}).encode())
    if age > SECONDS:
        return ""
    again = "" if left <= 1 else f"; to try again now, remove {place}"
    return f"not begun: {age:.0f} s ago an attempt with the same flags ended with: {line}{again}"


def keep(job: str, arguments: list[str], error: InputError, line: str) -> None:
    """Leaves a note for the next attempts, unless the error is an outage that may pass."""
    if (place := _place(job, arguments)) and not isinstance(error, Outage):
        with contextlib.suppress(Exception):  # a job must not fail because of its note
            note = {"line": line, "left": FURTHER, "time": time.time()}
            storage.write_atomic(place, json.dumps(note).encode())


def _place(job: str, arguments: list[str]) -> str:
    folder = os.environ.get(FOLDER, "")
    digest = hashlib.sha256(json.dumps([job, *arguments]).encode()).hexdigest()[:16]
    return storage.join(folder, f"{job}-{digest}.json") if folder else ""
