"""The networks that the benchmarks train, and images in memory for them. Does not need Ray."""

from collections.abc import Iterator

import torch

from pipeline.config import DiffusionConfig, ImageConfig, ModelConfig, ModelSpec, TrainConfig
from pipeline.data.batch import Batch

UNET = ModelSpec(ModelConfig(), ImageConfig(32, 3), DiffusionConfig())
"""The default UNet in the structure of improved-diffusion, at 32x32x3: 6.95 M parameters."""
CIFAR = ModelSpec(ModelConfig(128, (1, 2, 2, 2)), ImageConfig(32, 3), DiffusionConfig())
"""The UNet of Ho et al. 2020 for CIFAR-10, with scale-shift: 38.3 M parameters."""
IMAGENET_64 = ModelSpec(ModelConfig(128, (1, 2, 3, 4), 3, (16, 8)), ImageConfig(64, 3), DiffusionConfig())
"""The UNet of improved-diffusion for ImageNet at 64x64: 121 M parameters."""
DIGITS = ModelSpec(ModelConfig(32, (1, 2), attention_resolutions=(4,)), ImageConfig(8, 1), DiffusionConfig())
"""The UNet of `make demo` without its classes: 1.08 M parameters."""
NETWORKS = {"digits": DIGITS, "unet": UNET, "cifar": CIFAR, "imagenet_64": IMAGENET_64}


def in_memory(config: TrainConfig, image: ImageConfig) -> Iterator[Batch]:
    """Yields endless batches of the same random images, with new ids in each batch."""
    size = config.batch_size
    generator = torch.Generator().manual_seed(0)
    shape = (size, image.channels, image.size, image.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    zeros, ones = torch.zeros(size, dtype=torch.int64), torch.ones(size)
    step = 0
    while True:
        yield Batch(images, zeros, torch.arange(step * size, (step + 1) * size), zeros, ones)
        step += 1
