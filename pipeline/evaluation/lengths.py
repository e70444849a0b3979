"""Averages of other lengths than the exported one, reconstructed after the training (Karras et al. 2024)."""

import posixpath
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pipeline.config import ModelSpec
from pipeline.data import storage
from pipeline.errors import InputError
from pipeline.models import ema
from pipeline.models.export import save_model
from pipeline.models.unet import UNet


def reconstruct_models(model: UNet, folder: str, sigma_rels: tuple[float, ...]) -> list[dict[str, Tensor]]:
    """The weights of a model as averages of given lengths, at the newest snapshot's step.

    Args:
        model: any weights of the run; what is no parameter stays as it is.
        folder: where the run's snapshots are (URI).

    Returns:
        a state dict for each length.

    Raises:
        InputError: no snapshots, damaged ones or those of another model; a length outside (0, 0.28].
    """
    for length in sigma_rels:
        ema.power_gamma(length)
    files = {
        snapshot: file
        for file in storage.list_files(storage.absolute(folder))
        if (snapshot := ema.parse_snapshot(posixpath.basename(file)))
    }
    if not files:
        raise InputError(f"--snapshots {folder}: none there: train with --ema-lengths")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def read(snapshot: ema.Snapshot) -> dict[str, Tensor]:
        try:
            tensors = load(storage.read_bytes(files[snapshot]))
        except (OSError, SafetensorError) as error:
            raise InputError(f"--snapshots {files[snapshot]}: damaged: {error}") from None
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise InputError(f"--snapshots {files[snapshot]}: not of the model that --model names")
        return tensors

    averages = ema.reconstruct(sorted(files, key=lambda s: (s.step, s.sigma_rel)), read, list(sigma_rels))
    return [model.state_dict() | average for average in averages]


def write_model(uri: str, weights: dict[str, Tensor], spec: ModelSpec) -> None:
    """Writes a model folder wherever a URI may point."""
    with tempfile.TemporaryDirectory() as here:
        for file in sorted(save_model(Path(here) / "model", weights, spec).iterdir()):
            storage.write_atomic(storage.join(uri, file.name), file.read_bytes())
