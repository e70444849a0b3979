"""Tells whether Triton kernels can be used. They need a GPU, Triton, and a C compiler, which Triton calls."""

import warnings
from functools import cache

import torch


@cache
def work() -> bool:
    """True if Triton builds and runs a kernel here. If there is a GPU but it fails, a warning says why."""
    if not torch.cuda.is_available():
        return False
    try:
        from pipeline.gpu import philox

        number = torch.zeros(1, dtype=torch.int64, device="cuda")
        philox.normal([0, 0], number, number, 0, 1)
    except Exception as error:  # e.g. a missing package, compiler or driver, or an old GPU
        warnings.warn(f"Triton kernels can't be used, so training is slower: {error!r}", stacklevel=2)
        return False
    return True
