"""Records which hardware and libraries computed the samples of a dataset.

Different hardware and libraries round differently, so a few pixels of a sample differ between them.
"""

import json
import os

import torch

from pipeline import storage
from pipeline.errors import InputError

FILE = "arithmetic.json"
# torch computes matrix products and convolutions with the first of these that the CPU supports.
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512_f", "avx2", "sve2", "sve", "neon")
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


def arithmetic(device: torch.device, bf16: bool) -> str:
    """One line with the GPU, or the CPU's maker and instruction set, the versions of libraries, and the precision."""
    precision = "bf16" if bf16 else "fp32"
    if device.type == "cuda":
        about, libraries = torch.cuda.get_device_properties(device), torch.backends.cudnn.version()
        where = f"{about.name} ({about.major}.{about.minor}), cuDNN {libraries}"
    else:
        able = dict(getattr(torch.cpu, "get_capabilities", dict)())  # older torch can't tell
        best = next(
            (name for name in _INSTRUCTIONS if able.get(name)), torch.backends.cpu.get_cpu_capability()
        )
        limits = "".join(f" {name}={os.environ[name]}" for name in _LIMITS if os.environ.get(name))
        where = f"{str(able.get('cpu_name', 'CPU')).split()[0]} {best}{limits}"
    return f"{where}, torch {torch.__version__}, {precision}"


def claim(output: str, mine: str, mixed: bool) -> None:
    """Records the arithmetic of the first process that makes samples of an output, and checks that later ones match.

    Args:
        mine: this process's `arithmetic`.
        mixed: True if other arithmetic is allowed.

    Raises:
        InputError: this process computes with different arithmetic.
    """
    if not storage.create(storage.join(output, FILE), json.dumps({"arithmetic": mine}).encode()):
        check(output, mine, mixed)


def check(output: str, mine: str, mixed: bool) -> None:
    """Checks that this process computes like the one that began an output. Raises InputError as `claim`."""
    try:
        begun = str(json.loads(storage.read_bytes(storage.join(output, FILE)))["arithmetic"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return
    if begun != mine and not mixed:
        raise InputError(
            f"--output {output}: its samples were computed with {begun}, this node computes with {mine}, which rounds "
            "differently: use nodes of one kind, choose another folder, or give --mixed-arithmetic"
        )


def forget(output: str) -> None:
    """Removes the record from an output that has no samples yet."""
    uri = storage.join(output, FILE)
    if storage.exists(uri):
        storage.remove(uri)
