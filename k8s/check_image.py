"""Check that an image is complete: every job can be imported, and --compile works, on the GPU if there is one.

docker run --rm --interactive --read-only --tmpfs /tmp:exec IMAGE python - < k8s/check_image.py
"""

import importlib

import torch
from torch import Tensor

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig
from pipeline.gpu import available
from pipeline.models.unet import ModelSpec, build

JOBS = "prepare", "train", "tune", "generate", "evaluate", "plot", "submit"


def main() -> None:
    for job in JOBS:
        importlib.import_module(f"pipeline.commands.{job}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert device.type == "cpu" or available.work(), "Triton's kernels can't be used"
    small = ModelConfig(model_channels=16, channel_multipliers=(1, 2), res_blocks=1, attention_resolutions=())
    torch.manual_seed(0)
    model = build(ModelSpec(small, ImageConfig(16, 3), DiffusionConfig())).to(device)
    images, steps = torch.randn(2, 3, 16, 16, device=device), torch.tensor([3, 500], device=device)

    def gradient(network: torch.nn.Module) -> Tensor:
        model.zero_grad()
        (network(images, steps) - images).square().mean().backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    exact, compiled = gradient(model), gradient(torch.compile(model, dynamic=False))
    assert torch.allclose(exact, compiled, atol=1e-3 * float(exact.abs().max())), (
        "the compiled gradients differ"
    )
    print(f"{len(JOBS)} jobs; compiled for {device}")


main()
