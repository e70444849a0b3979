"""Snapshots of power-function averages, and averages of any length made from them (Karras et al. 2024).

A snapshot is an average at one step, in a file whose name gives the step and the length. After training, snapshots of
one or two lengths give the average of any other length ("post-hoc EMA").
"""

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pipeline import storage
from pipeline.errors import InputError
from pipeline.models.ema import power_gamma, reconstruction_weights
from pipeline.models.unet import UNet
from pipeline.redact import one_line


@dataclass(frozen=True)
class Snapshot:
    """The step of a stored average, and its relative length."""

    step: int
    sigma_rel: float

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"step-{self.step:09d}-length-{self.sigma_rel:g}.safetensors"


def parse_snapshot(name: str) -> Snapshot | None:
    """The inverse of `Snapshot.name`; None for any other file."""
    found = re.fullmatch(r"step-(\d+)-length-([\d.e-]+)\.safetensors", name)
    return Snapshot(int(found[1]), float(found[2])) if found else None


def mix_snapshots(
    snapshots: list[Snapshot], read: Callable[[Snapshot], dict[str, Tensor]], sigma_rels: list[float]
) -> list[dict[str, Tensor]]:
    """Averages of any lengths at the newest step, mixed from stored ones.

    Args:
        snapshots: the stored averages.
        read: returns the tensors of a snapshot by name; called once for each, so only one is in memory at a time.
        sigma_rels: wanted lengths.

    Returns:
        for each length the parameters by name, in the snapshots' dtype.
    """
    steps, lengths = [s.step for s in snapshots], [s.sigma_rel for s in snapshots]
    mixes = [reconstruction_weights(steps, lengths, max(steps), wanted) for wanted in sigma_rels]
    sums: list[dict[str, Tensor]] = [{} for _ in sigma_rels]
    dtypes: dict[str, torch.dtype] = {}
    for i, snapshot in enumerate(snapshots):
        for name, tensor in read(snapshot).items():
            dtypes[name] = tensor.dtype
            for mix, total in zip(mixes, sums, strict=True):
                # Summed in float64, because the weights may be large and of both signs.
                total[name] = total.get(name, 0) + mix[i] * tensor.double()
    return [{name: tensor.to(dtypes[name]) for name, tensor in total.items()} for total in sums]


def posthoc_ema(model: UNet, folder: str, sigma_rels: tuple[float, ...]) -> list[dict[str, Tensor]]:
    """The weights of a model as averages of given lengths, at the step of the newest snapshot.

    Args:
        model: any weights of the run; everything that is not a parameter is kept.
        folder: URI of the folder with the run's snapshots.
        sigma_rels: wanted lengths, in (0, 0.28].

    Returns:
        a state dict for each length.

    Raises:
        InputError: there are no snapshots, some are damaged or of another model, or a length is outside (0, 0.28].
    """
    for length in sigma_rels:
        power_gamma(length)
    files = {
        snapshot: file
        for file in storage.list_files(storage.absolute(folder))
        if (snapshot := parse_snapshot(posixpath.basename(file)))
    }
    if not files:
        raise InputError(f"--snapshots {folder}: holds no snapshots: train with --ema-lengths")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def read(snapshot: Snapshot) -> dict[str, Tensor]:
        try:
            tensors = load(storage.read_bytes(files[snapshot]))
        except SafetensorError as error:
            raise InputError(f"--snapshots {files[snapshot]}: damaged: {one_line(error)}") from None
        except OSError as error:
            raise InputError(f"--snapshots {files[snapshot]}: can't be read: {one_line(error)}") from None
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise InputError(f"--snapshots {files[snapshot]}: does not belong to --model")
        return tensors

    averages = mix_snapshots(sorted(files, key=lambda s: (s.step, s.sigma_rel)), read, list(sigma_rels))
    return [model.state_dict() | average for average in averages]
