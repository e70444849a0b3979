"""Distributed training, tuning and sampling of denoising diffusion models on Ray.

What `__all__` names is the public API: it keeps its names and meaning within a minor version. A name is imported when
it is first asked for, so that `import pipeline` needs neither torch nor Ray.

    from pipeline import load_model, sample_images
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_MODULES = {
    "pipeline.config": (
        "DiffusionConfig", "ImageConfig", "ModelConfig", "ModelSpec", "OptimizerConfig", "TrainConfig"
    ),
    "pipeline.errors": ("InputError", "Interrupted", "JobFailed"),
    "pipeline.cluster.session": ("connect", "disconnect"),
    "pipeline.data.shards": ("PrepareConfig", "prepare"),
    "pipeline.data.index": ("DatasetIndex", "Splits", "open_dataset", "open_splits"),
    "pipeline.training.trainer": ("Trained", "train"),
    "pipeline.tuning.config": ("TuneConfig",),
    "pipeline.tuning.search": ("search",),
    "pipeline.generation.config": ("GenerateConfig",),
    "pipeline.generation.job": ("generate",),
    "pipeline.evaluation.config": ("EvaluateConfig",),
    "pipeline.evaluation.evaluate": ("evaluate",),
    "pipeline.evaluation.bits": ("BitsPerDim", "held_out_bits"),
    "pipeline.diffusion.schedules": ("make_betas",),
    "pipeline.diffusion.process": ("Process", "make_process", "q_sample"),
    "pipeline.diffusion.losses": ("training_loss",),
    "pipeline.diffusion.samplers": ("sample",),
    "pipeline.models.unet": ("UNet",),
    "pipeline.models.export": ("load_model", "save_model"),
    "pipeline.models.diffusers": ("export_diffusers",),
    "pipeline.models.sampling": ("sample_images",),
    "pipeline.pictures.make": ("draw_samples", "process_strip"),
}  # fmt: skip
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
