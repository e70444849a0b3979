"""Checkpoints: all of `TrainState` as safetensors and JSON, checked against their own digests on reading.

A checkpoint is a folder. `state.json` is written last and holds the SHA-256 of every other file, so that a
half-written or damaged checkpoint is told from a good one before anything of it is used.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.training.loop import TrainState

FORMAT = 1


class DamagedCheckpoint(RuntimeError):
    """A checkpoint that is incomplete or whose bytes are not those that were written."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint's contents, on the CPU.

    Attributes:
        averages: by parameter name, one dict for each decay, in the order of `loop.decays`.
        optimizer: "PARAMETER/STATE" to tensor.
    """

    step: int
    weights: dict[str, Tensor]
    averages: list[dict[str, Tensor]]
    optimizer: dict[str, Tensor]
    sampler: dict[str, Tensor]


def capture(state: TrainState) -> Saved:
    """Copies a training state to the CPU: later steps don't change the copy."""
    names = [name for name, _ in state.model.named_parameters()]
    parameters = dict(state.model.named_parameters())

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True).contiguous()

    return Saved(
        step=state.step,
        weights={name: copy(tensor) for name, tensor in state.model.state_dict().items()},
        averages=[
            {name: copy(tensor) for name, tensor in zip(names, average, strict=True)}
            for average in state.averages
        ],
        optimizer={
            f"{name}/{key}": copy(value)
            for name in names
            for key, value in state.optimizer.state.get(parameters[name], {}).items()
        },
        sampler={name: copy(tensor) for name, tensor in state.sampler.items()},
    )


def restore(state: TrainState, saved: Saved) -> None:
    """Puts a checkpoint into a fresh training state, in place, bit for bit."""
    state.model.load_state_dict(saved.weights)
    parameters = dict(state.model.named_parameters())
    with torch.no_grad():
        for average, stored in zip(state.averages, saved.averages, strict=True):
            for tensor, name in zip(average, parameters, strict=True):
                tensor.copy_(stored[name])
    for name, parameter in parameters.items():
        state.optimizer.state[parameter] = {
            # Adam's step counter lives where `fused` wants it, beside the parameter.
            key.rpartition("/")[2]: value.to(parameter.device)
            if value.ndim == 0
            else torch.empty_like(parameter).copy_(value)
            for key, value in saved.optimizer.items()
            if key.rpartition("/")[0] == name
        }
    state.sampler = dict(saved.sampler)
    state.step = saved.step


def write(folder: Path, saved: Saved, extra: dict[str, Any]) -> None:
    """Writes a checkpoint into an existing folder; `extra` is JSON kept beside it."""
    files = {
        "weights.safetensors": saved.weights,
        "averages.safetensors": {
            f"{i}/{name}": tensor
            for i, average in enumerate(saved.averages)
            for name, tensor in average.items()
        },
        "optimizer.safetensors": saved.optimizer,
        "sampler.safetensors": saved.sampler,
    }
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    state = {
        "format": FORMAT,
        "step": saved.step,
        "averages": len(saved.averages),
        "sha256": {name: _digest(folder / name) for name in files},
        **extra,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True))


def read(folder: Path) -> tuple[Saved, dict[str, Any]]:
    """Reads a checkpoint and verifies every byte of it.

    Returns:
        the contents, and all of `state.json`.

    Raises:
        DamagedCheckpoint: a file is missing, cut short or altered.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        for name, digest in state["sha256"].items():
            if _digest(folder / name) != digest:
                raise DamagedCheckpoint(f"{folder.name}: {name} is damaged")
        flat = load_file(folder / "averages.safetensors")
        saved = Saved(
            step=state["step"],
            weights=load_file(folder / "weights.safetensors"),
            averages=[
                {name.partition("/")[2]: t for name, t in flat.items() if name.startswith(f"{i}/")}
                for i in range(state["averages"])
            ],
            optimizer=load_file(folder / "optimizer.safetensors"),
            sampler=load_file(folder / "sampler.safetensors"),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{folder.name}: {type(error).__name__}: {error}") from error
    return saved, state


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
