"""Where Triton's kernels can be used: on a GPU, with Triton installed and a C compiler, which it calls to load them."""

import warnings
from functools import cache

import torch


@cache
def work() -> bool:
    """Whether Triton builds and runs a kernel here; a warning says why not, where there is a GPU."""
    if not torch.cuda.is_available():
        return False
    try:
        from pipeline.gpu import philox

        number = torch.zeros(1, dtype=torch.int64, device="cuda")
        philox.normal([0, 0], number, number, 0, 1)
    except Exception as error:  # anything: a missing package, compiler or driver, or a GPU that is too old
        warnings.warn(f"Triton's kernels can't be used, and training is slower: {error!r}", stacklevel=2)
        return False
    return True
