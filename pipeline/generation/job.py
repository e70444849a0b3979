"""Generating a dataset exactly once: what is there is kept, what is missing is made, nothing is made twice."""

import json
import os
import posixpath
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import ray
import ray.data

from pipeline import __version__
from pipeline.config import ModelSpec
from pipeline.data import storage
from pipeline.display import Display
from pipeline.errors import InputError
from pipeline.generation.card import dataset_card
from pipeline.generation.config import GenerateConfig, check, identity
from pipeline.generation.plan import Piece, missing, parse_name
from pipeline.generation.sampler import Sampler
from pipeline.models.export import load_model, model_fingerprint, pack_model

LOCK_SECONDS = 60.0
MANIFEST = "manifest.json"
SETTINGS = "settings.json"
LOCK = "lock.json"


def generate(config: GenerateConfig, model_folder: str, model_name: str) -> dict[str, Any]:
    """Makes what is missing of a dataset.

    Args:
        model_folder: an exported model on this machine.
        model_name: how the manifest names it, with its version pinned.

    Raises:
        InputError: settings that don't fit the model, an output that holds another dataset or is being
            written by another driver, too many blank images.
    """
    folder = Path(model_folder)
    _, spec = load_model(folder)
    check(config, spec)
    storage.check_writable(config.output)
    output = storage.absolute(config.output)
    fingerprint = model_fingerprint(folder)
    wanted = identity(config, spec, fingerprint)
    owner = _take_lock(output)
    try:
        _claim(output, wanted)
        notes = _finished(output, config)
        todo = list(missing(config.count, config.rows_per_file, notes))
        began = time.monotonic()
        blank = _make(todo, config, folder, output, owner) if todo else 0
        seconds = time.monotonic() - began
        made = sum(piece.stop - piece.start for piece in todo)
        if blank > config.max_blank_fraction * max(made, 1):
            raise InputError(
                f"{blank} of {made} samples are blank, more than --max-blank-fraction "
                f"{config.max_blank_fraction:g} allows: the model is not trained enough, or --guidance too high"
            )
        notes = _finished(output, config)
        _describe(output, config, spec, wanted, model_name, notes)
    finally:
        _release_lock(output, owner)
    total = sum(piece.stop - piece.start for piece in notes)
    result: dict[str, Any] = {"output": config.output, "count": total}
    result["metrics"] = {
        "generated": made,
        "kept": total - made,
        "images_per_second": made / seconds if made else 0.0,
    }
    return result


def _make(todo: list[Piece], config: GenerateConfig, folder: Path, output: str, owner: str) -> int:
    """Runs the actor pool over the pieces; returns how many images are blank."""
    resources = ray.cluster_resources()
    most = config.actors or int(resources.get("GPU" if config.gpu else "CPU", 1))
    most = max(1, min(most, len(todo)))
    least = min(config.min_actors, most)
    pieces = ray.data.from_items([piece._asdict() for piece in todo], override_num_blocks=len(todo))
    # Through the object store, once: the nodes need not see the model's folder. In a list, since Ray would put
    # a bare reference's value into the actor's own arguments, which a restarted actor can't find again.
    model = [ray.put(pack_model(folder))]
    # Ray Data restarts a killed actor and gives its piece to another; the file was not there yet.
    done = pieces.map(
        Sampler,
        fn_constructor_args=(model, config, output),
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most, initial_size=most),
        num_cpus=1,
        num_gpus=1 if config.gpu else 0,
    )
    total = sum(piece.stop - piece.start for piece in todo)
    display, images, blank = Display("generate", total, "images"), 0, 0
    began, beat = time.monotonic(), time.monotonic()
    try:
        for row in done.iter_rows():
            images += row["stop"] - row["start"]
            blank += row["blank"]
            display.update(images, f"{images / (time.monotonic() - began):.0f} images/s")
            if time.monotonic() - beat > LOCK_SECONDS / 4:
                beat = time.monotonic()
                _write_lock(output, owner)
    finally:
        display.close()
    return blank


def _finished(output: str, config: GenerateConfig) -> dict[Piece, dict[str, Any]]:
    """Pieces whose note is there and whose file has the length that the note says."""
    place = storage.join(output, "notes")
    if not storage.exists(place):
        return {}
    finished = {}
    for uri in storage.list_files(place, (".json",)):
        name = posixpath.basename(uri).removesuffix(".json")
        if piece := parse_name(name):
            note = json.loads(storage.read_bytes(uri))
            if config.format == "png" or storage.size(storage.join(output, "data", name)) == note["bytes"]:
                finished[piece] = {"file": name, **note}
    if config.format != "png" and storage.exists(storage.join(output, "data")):
        for uri in storage.list_files(storage.join(output, "data"), (".parquet", ".tar")):
            if parse_name(posixpath.basename(uri)) is None:
                raise InputError(f"--output {config.output}: {uri} is not of this dataset; move it away")
    return finished


def _claim(output: str, wanted: dict[str, Any]) -> None:
    """An output belongs to one model and one set of settings."""
    place = storage.join(output, SETTINGS)
    if storage.exists(place):
        before = json.loads(storage.read_bytes(place))
        changed = [key for key in wanted if before.get(key) != wanted[key]]
        if changed:
            raise InputError(
                f"--output {output} holds samples made with {changed[0]} = {before.get(changed[0])}, now it is "
                f"{wanted[changed[0]]}: keep it, or choose another folder"
            )
    else:
        storage.write_atomic(place, json.dumps(wanted, indent=1).encode())


def _describe(
    output: str,
    config: GenerateConfig,
    spec: ModelSpec,
    settings: dict[str, Any],
    model_name: str,
    notes: dict[Piece, dict[str, Any]],
) -> None:
    manifest = {
        "format": "ray-ddpm-samples",
        "version": __version__,
        "model": model_name,
        "settings": settings,
        "trained_on": spec.provenance,
        "count": sum(note["rows"] for note in notes.values()),
        "files": [notes[piece] for piece in sorted(notes)],
    }
    storage.write_atomic(storage.join(output, MANIFEST), json.dumps(manifest, indent=1, default=str).encode())
    storage.write_atomic(storage.join(output, "README.md"), dataset_card(manifest, config, spec).encode())


def _take_lock(output: str) -> str:
    """One driver an output. A driver that stopped beating is dead, and its lock is taken over."""
    place = storage.join(output, LOCK)
    if storage.exists(place):
        lock = json.loads(storage.read_bytes(place) or b"{}")
        dead = lock.get("host") == socket.gethostname() and not Path(f"/proc/{lock.get('pid')}").exists()
        if not dead and time.time() - lock.get("time", 0) < LOCK_SECONDS:
            raise InputError(
                f"--output {output} is being written by process {lock.get('pid')} on {lock.get('host')}: wait for it, "
                "or choose another folder"
            )
    owner = uuid.uuid4().hex
    _write_lock(output, owner)
    return owner


def _write_lock(output: str, owner: str) -> None:
    lock = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    storage.write_atomic(storage.join(output, LOCK), json.dumps(lock).encode())


def _release_lock(output: str, owner: str) -> None:
    place = storage.join(output, LOCK)
    if storage.exists(place) and json.loads(storage.read_bytes(place)).get("owner") == owner:
        storage.remove(place)
