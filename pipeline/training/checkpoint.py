"""Checkpoints: the whole `TrainState` as safetensors and JSON, verified by SHA-256 digests on reading.

A checkpoint is a folder on any storage (see storage.py). `state.json` is written last. It holds the SHA-256 of every
file and of its own content, so a reader recognizes an incomplete or damaged checkpoint before it uses any of it. The
storage is the only record of the checkpoints that exist, so no separate list can disagree with it.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline import storage
from pipeline.training.state import TrainState
from pipeline.versions import VERSIONS, check_readable, check_same

STATE = "state.json"
WEIGHTS, OPTIMIZER, TIMESTEP_SAMPLER = (f"{part}.safetensors" for part in ("weights", "optimizer", "sampler"))
# Checkpoints of 0.1.0 hold all averages in this file, with keys "NUMBER/PARAMETER".
AVERAGES = "averages.safetensors"


class DamagedCheckpoint(RuntimeError):
    """A checkpoint is incomplete, or its bytes differ from those that were written."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint's contents, on the CPU.

    Attributes:
        step: optimizer steps done.
        weights: the model's state dict.
        averages: averaged parameters by name, one dict per average, in the order of `TrainState.averages`.
        optimizer: tensors of the optimizer's state, with keys "PARAMETER/STATE".
        timestep_sampler: state of the timestep sampler.
    """

    step: int
    weights: dict[str, Tensor]
    averages: list[dict[str, Tensor]]
    optimizer: dict[str, Tensor]
    timestep_sampler: dict[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """The verified files of a checkpoint.

    Attributes:
        state: contents of `state.json`.
        files: bytes of each file, by name.
    """

    state: dict[str, Any]
    files: dict[str, bytes]


def capture(state: TrainState) -> Saved:
    """Copies a training state to the CPU. Later steps do not change the copy."""
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
        timestep_sampler={name: copy(tensor) for name, tensor in state.timestep_sampler.items()},
    )


def restore(state: TrainState, saved: Saved) -> None:
    """Loads a checkpoint into a new training state, in place and bit for bit."""
    state.model.load_state_dict(saved.weights)
    parameters = dict(state.model.named_parameters())
    with torch.no_grad():
        for average, stored in zip(state.averages, saved.averages, strict=True):
            for tensor, name in zip(average, parameters, strict=True):
                tensor.copy_(stored[name])
    for name, parameter in parameters.items():
        state.optimizer.state[parameter] = {
            # Fused Adam needs its step counter on the parameter's device.
            key.rpartition("/")[2]: value.to(parameter.device)
            if value.ndim == 0
            else torch.empty_like(parameter).copy_(value)
            for key, value in saved.optimizer.items()
            if key.rpartition("/")[0] == name
        }
    state.timestep_sampler = dict(saved.timestep_sampler)
    state.step = saved.step


def average_file(number: int) -> str:
    """The name of an average's file. Each average has its own file, because an export reads only the first."""
    return f"average-{number}.safetensors"


def new_name(step: int) -> str:
    """A folder name that sorts by step, then by time. A repeated step gets a new name."""
    return f"step-{step:09d}-{time.time_ns() // 1_000_000:013d}"


def complete(folder: str) -> list[str]:
    """The URIs of the completely written checkpoints in a folder, newest first."""
    if not storage.exists(folder):
        return []
    states = storage.list_files(folder, (STATE,))
    return sorted((uri.rpartition("/")[0] for uri in states), key=storage.name, reverse=True)


def write(uri: str, saved: Saved, extra: dict[str, Any]) -> None:
    """Writes a checkpoint.

    Args:
        extra: JSON values that `state.json` holds beside its own.
    """
    files = {
        WEIGHTS: saved.weights,
        **{average_file(i): average for i, average in enumerate(saved.averages)},
        OPTIMIZER: saved.optimizer,
        TIMESTEP_SAMPLER: saved.timestep_sampler,
    }
    digests = {}
    for name, tensors in files.items():
        data = save(tensors)
        storage.write_atomic(storage.join(uri, name), data)
        digests[name] = _digest(data)
    state = {
        "versions": VERSIONS,
        "step": saved.step,
        "averages": len(saved.averages),
        "sha256": digests,
        **extra,
    }
    content = {"sha256": _digest(_canonical(state)), "state": state}
    storage.write_atomic(storage.join(uri, STATE), json.dumps(content, indent=1, sort_keys=True).encode())


def read(uri: str) -> tuple[Saved, dict[str, Any]]:
    """Reads a checkpoint and verifies every byte of it.

    Returns:
        the checkpoint's contents, and those of `state.json`.

    Raises:
        Exception: as `fetch` and `unpack`.
    """
    stored = fetch(uri)
    return unpack(stored), stored.state


def fetch(uri: str) -> Stored:
    """Reads a checkpoint's files and verifies every byte of them.

    Raises:
        DamagedCheckpoint: a file is missing, cut short or altered.
        InputError: an incompatible release wrote it.
        Exception: the storage's own error if it can't be read now. The checkpoint may still be intact.
    """
    state = _read_state(uri)
    check_same(state.get("versions"), uri)
    averages = [AVERAGES] if AVERAGES in state["sha256"] else map(average_file, range(state["averages"]))
    files = (WEIGHTS, *averages, OPTIMIZER, TIMESTEP_SAMPLER)
    return Stored(state, {name: _read_file(uri, state, name) for name in files})


def unpack(stored: Stored) -> Saved:
    """Decodes a checkpoint's files.

    Raises:
        DamagedCheckpoint: a file is not safetensors, although its digest is correct.
    """
    step, count = stored.state["step"], stored.state["averages"]
    try:
        tensors = {name: load(data) for name, data in stored.files.items()}
    except SafetensorError as error:
        raise DamagedCheckpoint(f"step {step}: {error}") from error
    return Saved(
        step=step,
        weights=tensors[WEIGHTS],
        averages=[
            _one_of(tensors[AVERAGES], i) if AVERAGES in tensors else tensors[average_file(i)]
            for i in range(count)
        ],
        optimizer=tensors[OPTIMIZER],
        timestep_sampler=tensors[TIMESTEP_SAMPLER],
    )


def read_model(uri: str) -> tuple[dict[str, Tensor], int]:
    """Reads the exported model: the weights, with the first average in place of the parameters.

    Only the two files that this needs are read and verified.

    Returns:
        the state dict and the step.

    Raises:
        Exception: as `fetch`.
    """
    state = _read_state(uri)
    together = AVERAGES in state["sha256"]
    names = WEIGHTS, AVERAGES if together else average_file(0)
    weights, average = (load(_read_file(uri, state, name)) for name in names)
    return weights | (_one_of(average, 0) if together else average), state["step"]


def _read_state(uri: str) -> dict[str, Any]:
    try:
        content = json.loads(storage.read_bytes(storage.join(uri, STATE)))
        state: dict[str, Any] = content["state"]
        if _digest(_canonical(state)) != content["sha256"]:
            raise DamagedCheckpoint(f"{storage.name(uri)}: {STATE} is damaged")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{storage.name(uri)}: {STATE}: {type(error).__name__}: {error}") from error
    check_readable(state.get("versions"), uri)
    return state


def _read_file(uri: str, state: dict[str, Any], name: str) -> bytes:
    try:
        data = storage.read_bytes(storage.join(uri, name))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedCheckpoint(f"{storage.name(uri)}: {name} is missing") from error
    if _digest(data) != state["sha256"].get(name):
        raise DamagedCheckpoint(f"{storage.name(uri)}: {name} is damaged")
    return data


def _one_of(averages: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """One of the averages in a file of release 0.1.0."""
    prefix = f"{number}/"
    return {name.removeprefix(prefix): tensor for name, tensor in averages.items() if name.startswith(prefix)}


def _canonical(state: dict[str, Any]) -> bytes:
    return json.dumps(state, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
