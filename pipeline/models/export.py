"""Reads and writes exported models: a folder of model.safetensors, config.json and a card, on any storage.

The header of model.safetensors also contains the configuration, so this file alone is a whole model. A model is
replaced by one rename, or one put on an object store. So readers, and processes that are killed, never combine the
weights and the configuration of two models. config.json has the same content for people and other programs. Models of
release 0.1.0 have it only there. No Ray, MLflow or pickle is used.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline import storage
from pipeline.config import ModelSpec, from_dict, to_dict
from pipeline.errors import InputError
from pipeline.markdown import plain, table
from pipeline.models.unet import UNet, build
from pipeline.redact import one_line
from pipeline.versions import VERSIONS, check_readable

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_METADATA = "__metadata__"
_SHOWN_CLASSES = 100  # a card names at most this many classes
Place = TypeVar("Place", str, Path)


class Packed(NamedTuple):
    """The content of a model folder, to read it only once and to send it to nodes that can't reach the folder.

    Attributes:
        config: the configuration, JSON.
        weights: the content of model.safetensors.
        where: the folder, for messages.
    """

    config: bytes
    weights: bytes
    where: str


def save_model(folder: Place, weights: dict[str, Tensor], spec: ModelSpec, card: str | None = None) -> Place:
    """Writes a model folder (path or URI), or replaces the model in it. Returns the folder."""
    config = json.dumps(to_dict(spec) | {"versions": VERSIONS}, indent=1, sort_keys=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    packed = Packed(config.encode(), save(tensors), str(folder))
    write_model(folder, packed, card or model_card(spec))
    return folder


def write_model(folder: str | Path, model: Packed, card: str) -> None:
    """Writes a packed model unchanged, or replaces the model in a folder."""
    files = {WEIGHTS: _whole_file(model.weights, model.config), CONFIG: model.config, CARD: card.encode()}
    for name, data in files.items():
        storage.write_atomic(storage.join(str(folder), name), data)


def _whole_file(weights: bytes, config: bytes) -> bytes:
    """Safetensors with the configuration and the `format` that other libraries expect in the header.

    The header is written here in a fixed order, because safetensors orders its entries arbitrarily, and equal models
    must have equal bytes.
    """
    size = int.from_bytes(weights[:8], "little")
    tensors = json.loads(weights[8 : 8 + size])
    tensors.pop(_METADATA, None)
    header = {_METADATA: {"format": "pt", CONFIG: config.decode()}, **tensors}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(weights)[8 + size :]])


def load_model(model: str | Path | Packed) -> tuple[UNet, ModelSpec]:
    """Rebuilds a model from its folder (path or URI), in eval mode, on the CPU.

    Raises:
        InputError: not a model folder, a damaged one, one that can't be read, or one with weights that are not finite.
    """
    packed = pack_model(model)
    spec = read_spec(packed)
    try:
        network = build(spec)
        network.load_state_dict(load(packed.weights))
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged(packed.where, error) from None
    if bad := [name for name, weight in network.state_dict().items() if not weight.isfinite().all()]:
        raise InputError(
            f"{packed.where}: the model's weights are not finite ({len(bad)} tensors, the first is {bad[0]}): its "
            "training diverged: take an earlier checkpoint or another model"
        )
    return network.eval().requires_grad_(False), spec


def read_spec(model: str | Path | Packed) -> ModelSpec:
    """The specification of a model, with its provenance. Raises InputError as `load_model`."""
    packed = pack_model(model)
    try:
        content = json.loads(packed.config)
        check_readable(content.pop("versions", None), packed.where)
        return from_dict(ModelSpec, content, f"{packed.where}/{CONFIG}")
    except InputError:
        raise
    except (ValueError, AttributeError) as error:
        raise _damaged(packed.where, error) from None


def pack_model(model: str | Path | Packed) -> Packed:
    """Reads a model folder; a packed model is returned unchanged. Raises InputError as `load_model`."""
    if isinstance(model, Packed):
        return model
    where = str(model)
    try:
        weights = storage.read_bytes(storage.join(where, WEIGHTS))
        config = _config_in(weights) or storage.read_bytes(storage.join(where, CONFIG))
    except (FileNotFoundError, NotADirectoryError) as error:
        name, near = storage.name(str(error.filename or error)), _model_near(where)
        hint = f"; the output of a training has its model in {near}" if near else ""
        raise InputError(f"{where} is not an exported model: no {name} in it{hint}") from None
    except Exception as error:
        if not (isinstance(error, OSError) or storage.is_storage_error(error)):
            raise
        raise InputError(f"{where}: can't be read: {one_line(error)}") from None
    return Packed(config, weights, where)


def _model_near(where: str) -> str:
    """The model in a training's output, of which `where` is a part: the output, its checkpoints, one of them, a file of
    the model. "" if there is none."""
    above = where.rstrip("/").rpartition("/")[0]
    folders = (where, above, above.rpartition("/")[0])
    places = [above, *(storage.join(folder, "model") for folder in folders if folder)]
    return next((place for place in places if place and _is_model(place)), "")


def _is_model(where: str) -> bool:
    """True if weights are there; False also if the storage does not say."""
    try:
        return storage.exists(storage.join(where, WEIGHTS))
    except Exception:
        return False


def _config_in(weights: bytes) -> bytes:
    """The configuration in the header of safetensors; empty if there is none."""
    try:
        header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
        return str(header[_METADATA][CONFIG]).encode()
    except (ValueError, KeyError, TypeError):
        return b""


def _damaged(where: str, error: Exception) -> InputError:
    return InputError(f"{where} holds a damaged model: {one_line(error)}")


def model_fingerprint(model: str | Path | Packed) -> str:
    """SHA-256 of the configuration and the weights: equal for equal models, wherever they are stored."""
    packed, digest = pack_model(model), hashlib.sha256()
    for content in (packed.config, packed.weights):
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def model_card(spec: ModelSpec) -> str:
    """A README.md with YAML front matter that describes the model and its provenance."""
    return (
        f"{front_matter(spec, 'ray-ddpm')}\n# Denoising diffusion model\n\n{summary(spec)}\n\n"
        "    from pipeline import load_model, sample_images\n"
        '    model, spec = load_model("this-folder")\n\n'
        f"{table('provenance', dict(sorted(spec.provenance.items())))}"
    )


def front_matter(spec: ModelSpec, library: str) -> str:
    """The metadata of a model card that the Hugging Face Hub reads: YAML between two lines of dashes."""
    content: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "unconditional-image-generation",
        "tags": list(dict.fromkeys(["diffusion", "ddpm", "ray-ddpm", library])),
    }
    if found := re.match(r"hf://datasets/([\w.-]+/[\w.-]+)", str(spec.provenance.get("data", ""))):
        content["datasets"] = [found[1]]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, width=10_000)}---\n"


def summary(spec: ModelSpec) -> str:
    """A description of a model and its training data, in Markdown."""
    image, diffusion, facts = spec.image, spec.diffusion, spec.provenance
    lines = [
        f"An epsilon-predicting UNet for {image.size}x{image.size} images of {image.channels} channel(s), "
        f"{plain(diffusion.schedule)} schedule, T = {diffusion.timesteps}, variance {diffusion.variance}."
    ]
    if spec.model.class_conditional:
        more = ", …" * (len(image.classes) > _SHOWN_CLASSES)
        shown = image.classes[:_SHOWN_CLASSES]
        names = ", ".join(name if name == str(i) else f"{i} {name}" for i, name in enumerate(shown))
        lines.append(f"Class-conditional, {len(image.classes)} classes: {plain(names)}{more}.")
    if "data" in facts:
        lines.append(
            f"Trained on {plain(facts['data'])} (fingerprint {plain(str(facts.get('data_fingerprint', ''))[:16])}): "
            f"{plain(facts.get('steps'))} steps of {plain(facts.get('batch_size'))} images."
        )
    return "\n".join(lines)
