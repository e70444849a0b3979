"""Freed memory stays with the process, in the main thread and in others."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
from pipeline import memory

def round():
    blocks = [b"x" * (8 << 20) for _ in range(16)]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    round()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def work():
    round()
    given_back = faults()
    eval(sys.argv[2])
    round()
    print(given_back, faults())

if sys.argv[1] == "thread":
    other = threading.Thread(target=work)
    other.start()
    other.join()
else:
    work()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone can be told to")
@pytest.mark.parametrize(
    ("where", "how"),
    [("main", "memory.keep()"), ("thread", "memory.keep()"), ("main", "memory.keep_up_to(2**30)")],
)
def test_memory_that_is_freed_is_not_fetched_from_the_system_again(where: str, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, where, how], capture_output=True, text=True, check=True, timeout=60
    )
    given_back, kept = map(int, done.stdout.split())
    pages = 16 * (8 << 20) // 4096
    assert given_back > pages / 2, "as glibc comes, or nothing is shown here"
    assert kept < pages / 100
