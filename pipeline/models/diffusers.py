"""Exports a model as a folder that diffusers loads. It writes JSON and safetensors, so diffusers is not needed.

The UNet has the structure and parameter names of diffusers' UNet2DModel, so the weights are copied unchanged.
"""

import json
from typing import Any

from safetensors.torch import save

from pipeline import storage
from pipeline.config import ModelSpec
from pipeline.diffusion.schedules import make_betas
from pipeline.errors import InputError
from pipeline.markdown import table
from pipeline.models.export import CARD, Place, front_matter, summary
from pipeline.models.unet import NORM_EPS, UNet, norm_groups, out_channels

_VARIANCE = {"fixed_large": "fixed_large", "fixed_small": "fixed_small"}
INDEX, WEIGHTS = "model_index.json", "unet/diffusion_pytorch_model.safetensors"
FILES = (WEIGHTS, "unet/config.json", "scheduler/scheduler_config.json", CARD, INDEX)


def export_diffusers(model: UNet, spec: ModelSpec, folder: Place) -> Place:
    """Writes model_index.json, unet/, scheduler/ and a card for `DDPMPipeline.from_pretrained`.

    A class-conditional model becomes a UNet2DModel with class embeddings, the last of which stands for "no label".
    diffusers' DDPMPipeline passes no labels, so such a model is used through UNet2DModel directly.

    Args:
        folder: path or URI to write to.

    Returns:
        the folder.

    Raises:
        InputError: diffusers has no counterpart for the model's variance or its Fourier features.
    """
    if spec.model.fourier_features:
        raise InputError("a model with Fourier features can't be exported: diffusers has no such network")
    if spec.diffusion.variance not in _VARIANCE:
        raise InputError(
            f"variance {spec.diffusion.variance} can't be exported: diffusers' learned_range interpolates other "
            "end points than Improved DDPM; train with --variance fixed_large or fixed_small"
        )
    pipeline = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    contents = (
        save(weights, {"format": "pt"}),
        _json(unet_config(spec)),
        _json(_scheduler_config(spec)),
        _card(spec).encode(),
        _json(pipeline),
    )
    for name, data in zip(FILES, contents, strict=True):
        storage.write_atomic(storage.join(str(folder), name), data)
    return folder


def unet_config(spec: ModelSpec) -> dict[str, Any]:
    """The arguments of UNet2DModel for the same network."""
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
        # With fewer steps than T, sampling begins at the last step, as in our samplers.
        "timestep_spacing": "trailing",
    }


def _card(spec: ModelSpec) -> str:
    steps = f"num_inference_steps={spec.diffusion.timesteps}"
    if not spec.model.class_conditional:
        usage = f"""
    from diffusers import DDPMPipeline

    images = DDPMPipeline.from_pretrained("this-folder")(batch_size=16, {steps}).images
"""
    else:
        shape = f"{spec.image.channels}, {spec.image.size}, {spec.image.size}"
        usage = f"""
DDPMPipeline passes no labels, which this network needs; class {len(spec.image.classes)} stands for no label:

    import torch
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained("this-folder")
    labels = torch.arange(16) % {len(spec.image.classes)}
    x = torch.randn(16, {shape})
    pipeline.scheduler.set_timesteps({spec.diffusion.timesteps})
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            epsilon = pipeline.unet(x, t, class_labels=labels).sample
            x = pipeline.scheduler.step(epsilon, t, x).prev_sample
    images = ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)  # [16, {shape}]
"""
    about = table("provenance", dict(sorted(spec.provenance.items())))
    return (
        f"{front_matter(spec, 'diffusers')}\n# Denoising diffusion model\n\n{summary(spec)}\n{usage}\n{about}"
    )


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()
