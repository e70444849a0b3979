"""Snapshots of power-function averages, and averages of any other length made of them (Karras et al. 2024).

A snapshot is an average as it stood at some step, in a file whose name says which. From those of one or two lengths
the average of any other length is reconstructed after the training ("post-hoc EMA").
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
    """When a stored average was taken, and its relative length."""

    step: int
    sigma_rel: float

    @property
    def name(self) -> str:
        """Its file's name."""
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
        read: the tensors of a snapshot by name; called once for each, and one at a time is held in memory.
        sigma_rels: the lengths that are wanted.

    Returns:
        the parameters by name for each length, of the snapshots' dtype.
    """
    steps, lengths = [s.step for s in snapshots], [s.sigma_rel for s in snapshots]
    mixes = [reconstruction_weights(steps, lengths, max(steps), wanted) for wanted in sigma_rels]
    sums: list[dict[str, Tensor]] = [{} for _ in sigma_rels]
    dtypes: dict[str, torch.dtype] = {}
    for i, snapshot in enumerate(snapshots):
        for name, tensor in read(snapshot).items():
            dtypes[name] = tensor.dtype
            for mix, total in zip(mixes, sums, strict=True):
                # In float64: the weights may be large and of both signs.
                total[name] = total.get(name, 0) + mix[i] * tensor.double()
    return [{name: tensor.to(dtypes[name]) for name, tensor in total.items()} for total in sums]


def posthoc_ema(model: UNet, folder: str, sigma_rels: tuple[float, ...]) -> list[dict[str, Tensor]]:
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
        power_gamma(length)
    files = {
        snapshot: file
        for file in storage.list_files(storage.absolute(folder))
        if (snapshot := parse_snapshot(posixpath.basename(file)))
    }
    if not files:
        raise InputError(f"--snapshots {folder}: none there: train with --ema-lengths")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def read(snapshot: Snapshot) -> dict[str, Tensor]:
        try:
            tensors = load(storage.read_bytes(files[snapshot]))
        except SafetensorError as error:
            raise InputError(f"--snapshots {files[snapshot]}: damaged: {one_line(error)}") from None
        except OSError as error:
            raise InputError(f"--snapshots {files[snapshot]}: can't be read: {one_line(error)}") from None
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise InputError(f"--snapshots {files[snapshot]}: not of the model that --model names")
        return tensors

    averages = mix_snapshots(sorted(files, key=lambda s: (s.step, s.sigma_rel)), read, list(sigma_rels))
    return [model.state_dict() | average for average in averages]
