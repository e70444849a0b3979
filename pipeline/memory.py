"""Sets malloc up for a process that trains."""

import ctypes

# Parameters of glibc's mallopt.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
AHEAD = 2**27  # bytes; more than a thread's heap can hold, so that no memory is returned


def keep() -> None:
    """Makes malloc keep freed memory for the next allocation, instead of returning it to the system.

    A training step frees a gigabyte, and the next step allocates it again. Memory from the system comes page by page,
    each of them cleared, which takes up to 7 % of a step. The process's peak size does not grow, but its size stays
    at the peak. glibc still returns blocks of more than 64 MB that a thread other than the first one frees, because a
    thread's heap can't hold more. Other C libraries are left unchanged.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(TOP_PAD, AHEAD)
