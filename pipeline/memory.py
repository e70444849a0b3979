"""Tells malloc to keep freed memory for the next allocation. C libraries other than glibc are left unchanged.

By default glibc returns large blocks to the system. Memory from the system comes page by page, each of them cleared.
"""

import ctypes

# Parameters of glibc's mallopt.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
AHEAD = 2**27  # bytes; more than a thread's heap can hold, so that no memory is returned


def keep() -> None:
    """Keeps all freed memory, for a process that trains.

    A training step frees a gigabyte, and the next step allocates it again, which takes up to 7 % of a step. The
    process's peak size does not grow, but its size stays at the peak. glibc still returns blocks of more than 64 MB
    that a thread other than the first one frees, because a thread's heap can't hold more.
    """
    _set({MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: AHEAD})


def keep_up_to(size: int) -> None:
    """Keeps freed memory of this many bytes, for a process that decodes images.

    Fetching its memory anew takes a fifth of the time of decoding an image of 256x256 pixels.
    """
    _set({MMAP_THRESHOLD: size, TRIM_THRESHOLD: size})


def _set(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)
