"""Checkpoints: all of `TrainState` as safetensors and JSON, checked against their own digests on reading.

A checkpoint is a folder on any storage (see storage.py). `state.json` is written last and holds the SHA-256
of every file, itself included: a half-written or damaged checkpoint is told from a good one before anything of it
is used. The storage is the only record of which checkpoints there are: no list of them can disagree with it.
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
# In checkpoints of 0.1.0: all averages, "NUMBER/PARAMETER" to tensor.
AVERAGES = "averages.safetensors"


class DamagedCheckpoint(RuntimeError):
    """A checkpoint that is incomplete or whose bytes are not those that were written."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint's contents, on the CPU.

    Attributes:
        averages: by parameter name, one dict for each decay, in the order of `decays`.
        optimizer: "PARAMETER/STATE" to tensor.
    """

    step: int
    weights: dict[str, Tensor]
    averages: list[dict[str, Tensor]]
    optimizer: dict[str, Tensor]
    timestep_sampler: dict[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """A checkpoint as it lies on storage, found whole.

    Attributes:
        state: all that `state.json` says.
        files: by name, their bytes.
    """

    state: dict[str, Any]
    files: dict[str, bytes]


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
        timestep_sampler={name: copy(tensor) for name, tensor in state.timestep_sampler.items()},
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
    state.timestep_sampler = dict(saved.timestep_sampler)
    state.step = saved.step


def average_file(number: int) -> str:
    """The file of an average. Each has one of its own: an export reads the first and no other."""
    return f"average-{number}.safetensors"


def new_name(step: int) -> str:
    """A folder name that sorts by step, then by when it was written: a step that is done again gets another one."""
    return f"step-{step:09d}-{time.time_ns() // 1_000_000:013d}"


def complete(folder: str) -> list[str]:
    """The URIs of the checkpoints in a folder that were written to their end, the newest first."""
    if not storage.exists(folder):
        return []
    states = storage.list_files(folder, (STATE,))
    return sorted((uri.rpartition("/")[0] for uri in states), key=storage.name, reverse=True)


def write(uri: str, saved: Saved, extra: dict[str, Any]) -> None:
    """Writes a checkpoint; `extra` is JSON kept beside it."""
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
        the contents, and all that `state.json` says.

    Raises:
        Exception: as `fetch` and `unpack`.
    """
    stored = fetch(uri)
    return unpack(stored), stored.state


def fetch(uri: str) -> Stored:
    """Reads a checkpoint's files and verifies every byte of them.

    Raises:
        DamagedCheckpoint: a file is missing, cut short or altered.
        InputError: a release that works otherwise wrote it.
        Exception: whatever the storage raises that can't read it now: that says nothing of the checkpoint.
    """
    state = _read_state(uri)
    check_same(state.get("versions"), uri)
    averages = [AVERAGES] if AVERAGES in state["sha256"] else map(average_file, range(state["averages"]))
    files = (WEIGHTS, *averages, OPTIMIZER, TIMESTEP_SAMPLER)
    return Stored(state, {name: _read_file(uri, state, name) for name in files})


def unpack(stored: Stored) -> Saved:
    """The contents of a checkpoint's files.

    Raises:
        DamagedCheckpoint: a file holds something else than tensors, although its digest is right.
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
    """The weights with the first average in the place of the parameters (the model that is exported), and the step.

    Reads and verifies nothing else of the checkpoint.

    Raises:
        DamagedCheckpoint: see `read`.
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
    """One average of those in a file of 0.1.0."""
    prefix = f"{number}/"
    return {name.removeprefix(prefix): tensor for name, tensor in averages.items() if name.startswith(prefix)}


def _canonical(state: dict[str, Any]) -> bytes:
    return json.dumps(state, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
