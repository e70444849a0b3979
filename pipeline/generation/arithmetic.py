"""What computes the samples. Another one rounds otherwise, and some pixels come out a little different."""

import json
import os

import torch

from pipeline import storage
from pipeline.errors import InputError

FILE = "arithmetic.json"
# The best of a CPU's decides how torch multiplies matrices and convolves.
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512_f", "avx2", "sve2", "sve", "neon")
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


def arithmetic(device: torch.device, bf16: bool) -> str:
    """Names it: the GPU or the CPU's maker and instructions, the libraries' versions, the precision."""
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
    """The first process that makes samples of an output says with what; the others must have the same.

    Args:
        mixed: whether they need not.

    Raises:
        InputError: another one.
    """
    if not storage.create(storage.join(output, FILE), json.dumps({"arithmetic": mine}).encode()):
        check(output, mine, mixed)


def check(output: str, mine: str, mixed: bool) -> None:
    """Whether this process computes as the one that began an output did. Raises InputError as `claim`."""
    try:
        begun = str(json.loads(storage.read_bytes(storage.join(output, FILE)))["arithmetic"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return
    if begun != mine and not mixed:
        raise InputError(
            f"--output {output}: its samples are computed by {begun}, this node computes by {mine}, which rounds "
            "otherwise: use nodes of one kind, choose another folder, or give --mixed-arithmetic"
        )


def forget(output: str) -> None:
    """For an output that has no samples yet."""
    uri = storage.join(output, FILE)
    if storage.exists(uri):
        storage.remove(uri)
