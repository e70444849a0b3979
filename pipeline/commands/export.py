"""Write a model for others: as a folder for diffusers, or as safetensors with its configuration and a card.

Example: ray-ddpm export --model models:/photos@newest --output photos-diffusers
"""

from dataclasses import dataclass
from typing import Any, Literal

from pipeline import storage
from pipeline.commands import cli
from pipeline.errors import InputError
from pipeline.output import check_apart


@dataclass(frozen=True)
class ExportConfig:
    """The model, the form of the export and its place."""

    model: str
    """Exported model folder, models:/NAME/VERSION or models:/NAME@ALIAS."""
    output: str
    """Folder for the export (URI): a new or empty one, or one with an earlier export, which is replaced."""
    to: Literal["diffusers", "safetensors"] = "diffusers"
    """Form of the export: diffusers (for DDPMPipeline.from_pretrained) or safetensors (for `pipeline.load_model`)."""


def execute(config: ExportConfig) -> dict[str, Any]:
    """Reads the model from a folder or the registry, and writes it."""
    from pipeline.models import diffusers, export
    from pipeline.tracking import registry

    packed, pinned = registry.resolve_model(config.model)
    model, spec = export.load_model(packed)
    if pinned == config.model and not pinned.startswith("models:/"):
        check_apart(config.output, "--model", config.model)
    files = diffusers.FILES if config.to == "diffusers" else (export.WEIGHTS, export.CONFIG, export.CARD)
    storage.check_writable(config.output)
    _check_ours(config.output, files)
    if config.to == "diffusers":
        diffusers.export_diffusers(model, spec, config.output)
    else:
        export.write_model(config.output, packed, export.model_card(spec))
    return {"output": config.output, "model": pinned, "count": len(files)}


def _check_ours(output: str, files: tuple[str, ...]) -> None:
    """Refuses a folder that holds anything but an earlier export of this form, whose README.md could be overwritten."""
    if not storage.exists(output):
        return
    ours = {storage.join(storage.open_fs(output)[1], name) for name in files}
    if others := sorted(storage.list_details(output).keys() - ours):
        raise InputError(
            f"--output {output}: holds {others[0]}, which does not belong to this export: choose a new folder"
        )


def main(arguments: list[str]) -> int:
    """Runs the job with these flags; returns its exit code."""
    return cli.main("export", __doc__ or "", ExportConfig, execute, arguments, ray="never")
