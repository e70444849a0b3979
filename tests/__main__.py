"""Every test but the soak tests, in two processes at once, of about equal length.

`python -m tests` shows what the first prints as it comes, and what the second printed when both have ended.
"""

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

PYTEST = [sys.executable, "-m", "pytest"]


def with_system_tests() -> list[str]:
    """The files that say `system` of a test: to import all the others would take half a minute."""
    files = sorted(Path(__file__).parent.rglob("test_*.py"))
    return [str(file) for file in files if "mark.system" in file.read_text()]


def run() -> int:
    """The exit code: the larger of the two."""
    with tempfile.TemporaryFile() as log:
        first = subprocess.Popen([*PYTEST, "-m", "system and not served and not soak", *with_system_tests()])
        rest = ["-m", "(not system or served) and not soak", "-p", "no:cacheprovider"]
        second = subprocess.Popen([*PYTEST, *rest], stdout=log, stderr=log)
        started = (first, second)
        for process in (*started, *started):
            with contextlib.suppress(KeyboardInterrupt):  # which they got as well: they clear up and end
                process.wait()
        log.seek(0)
        sys.stdout.buffer.write(log.read())
        sys.stdout.flush()
        return max(abs(process.wait()) for process in started)


if __name__ == "__main__":
    sys.exit(run())
