"""Bad input where a job that failed is begun again by itself: once is enough.

KubeRay makes a new cluster for a job that failed, `backoffLimit` times, whatever its exit code, and bad input fails each
time. So the attempt that meets it leaves a note. Those that follow read it and end, before any node is asked for.
"""

import contextlib
import hashlib
import json
import os
import time

from pipeline import storage
from pipeline.errors import InputError, Outage

FOLDER = "RAY_DDPM_REFUSALS"  # where the notes lie, a path or a URI; not set: no job is begun again by itself
FURTHER = 2  # attempts after the first: the `backoffLimit` of every job in k8s/
# Between two attempts pass some minutes. Whoever has mended the input, and not the flags, waits no longer than that.
SECONDS = 1800.0


def refused(job: str, arguments: list[str]) -> str:
    """What an attempt with these flags has refused a moment ago; empty for a first attempt.

    After as many as there are the note is gone: whoever applies the job again begins it again.
    """
    if not (place := _place(job, arguments)):
        return ""
    try:
        note = json.loads(storage.read_bytes(place))
        line, left, age = str(note["line"]), int(note["left"]), time.time() - float(note["time"])
    except Exception:
        # There is no note, or the storage does not answer, with errors of its own kind: the job itself says so.
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
    """Leaves a note for the attempts that follow, but not where waiting may help."""
    if (place := _place(job, arguments)) and not isinstance(error, Outage):
        with contextlib.suppress(Exception):  # a note is worth no failure
            note = {"line": line, "left": FURTHER, "time": time.time()}
            storage.write_atomic(place, json.dumps(note).encode())


def _place(job: str, arguments: list[str]) -> str:
    folder = os.environ.get(FOLDER, "")
    digest = hashlib.sha256(json.dumps([job, *arguments]).encode()).hexdigest()[:16]
    return storage.join(folder, f"{job}-{digest}.json") if folder else ""
