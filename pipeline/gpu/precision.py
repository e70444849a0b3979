"""Sets whether a GPU multiplies fp32 numbers exactly or rounds them to TF32."""

import sys


def use_tf32(allowed: bool) -> None:
    """Allows or forbids that torch rounds factors to TF32 in this process. Does nothing if torch is not imported."""
    if torch := sys.modules.get("torch"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
