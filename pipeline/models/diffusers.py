"""A model as a folder that diffusers loads. Written as JSON and safetensors: diffusers itself is not needed.

The UNet's structure and parameter names are UNet2DModel's, so the weights go over as they are.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pipeline.config import ModelSpec
from pipeline.diffusion.schedules import make_betas
from pipeline.errors import InputError
from pipeline.models.unet import NORM_EPS, UNet, norm_groups, out_channels

_VARIANCE = {"fixed_large": "fixed_large", "fixed_small": "fixed_small"}


def export_diffusers(model: UNet, spec: ModelSpec, folder: Path) -> Path:
    """Writes model_index.json, unet/ and scheduler/ for `DDPMPipeline.from_pretrained`.

    A class-conditional model becomes a UNet2DModel with class embeddings, the last of which stands for no
    label; diffusers' DDPMPipeline passes no labels, so there it is for UNet2DModel alone.

    Raises:
        InputError: what diffusers has no counterpart for.
    """
    if spec.diffusion.variance not in _VARIANCE:
        raise InputError(
            f"variance {spec.diffusion.variance} can't be exported: diffusers' learned_range interpolates other "
            "end points than Improved DDPM's; train with --variance fixed_large or fixed_small"
        )
    folder = Path(folder)
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    pipeline = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    _write(folder / "model_index.json", pipeline)
    _write(folder / "unet" / "config.json", unet_config(spec))
    _write(folder / "scheduler" / "scheduler_config.json", _scheduler_config(spec))
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def unet_config(spec: ModelSpec) -> dict[str, Any]:
    """UNet2DModel's arguments for the same network."""
    config, image = spec.model, spec.image
    attends = [
        image.size // 2**i in config.attention_resolutions for i in range(len(config.channel_multipliers))
    ]
    classes = {"num_class_embeds": len(image.classes) + 1} if config.class_conditional else {}
    return {
        "_class_name": "UNet2DModel",
        "sample_size": image.size,
        "in_channels": image.channels,
        "out_channels": out_channels(image, spec.diffusion),
        "block_out_channels": [config.model_channels * m for m in config.channel_multipliers],
        "layers_per_block": config.res_blocks,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "attention_head_dim": config.head_channels,
        "norm_num_groups": norm_groups(config),
        "attn_norm_num_groups": norm_groups(config),
        "norm_eps": NORM_EPS,
        "resnet_time_scale_shift": "scale_shift",
        "dropout": config.dropout,
        **classes,
    }


def _scheduler_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": spec.diffusion.timesteps,
        "trained_betas": make_betas(spec.diffusion).tolist(),
        "variance_type": _VARIANCE[spec.diffusion.variance],
        "clip_sample": True,
        "prediction_type": "epsilon",
        # Fewer steps than T begin at the last one, as ours do.
        "timestep_spacing": "trailing",
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))
