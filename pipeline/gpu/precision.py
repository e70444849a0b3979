"""How a GPU multiplies numbers of fp32: exactly, or rounded to TF32."""

import sys


def use_tf32(allowed: bool) -> None:
    """Lets torch round factors to TF32 in this process, or forbids it; nothing in a process without torch."""
    if torch := sys.modules.get("torch"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
