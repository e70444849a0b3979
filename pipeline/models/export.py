"""An exported model: a folder of model.safetensors, config.json and a card. No Ray, no MLflow, no pickle."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from pipeline.config import ModelSpec, from_dict, to_dict
from pipeline.errors import InputError
from pipeline.models.unet import UNet, build

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_model(folder: Path, weights: dict[str, Tensor], spec: ModelSpec, card: str | None = None) -> Path:
    """Writes a model folder, which appears whole or not at all; one that is there is replaced."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, partial / WEIGHTS
    )
    (partial / CONFIG).write_text(json.dumps(to_dict(spec), indent=1, sort_keys=True))
    (partial / CARD).write_text(card or model_card(spec))
    partial.chmod(0o755)
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        folder.replace(old / "model")
        partial.replace(folder)
        shutil.rmtree(old)
    else:
        partial.replace(folder)
    return folder


def load_model(folder: Path) -> tuple[UNet, ModelSpec]:
    """Rebuilds a model, in eval mode, on the CPU.

    Raises:
        InputError: not a model folder, or a damaged one.
    """
    return unpack_model(pack_model(folder), str(folder))


def pack_model(folder: Path) -> tuple[bytes, bytes]:
    """A model folder as (configuration, weights) bytes: to send a model to nodes that don't see the folder."""
    try:
        return (Path(folder) / CONFIG).read_bytes(), (Path(folder) / WEIGHTS).read_bytes()
    except OSError as error:
        name = Path(str(error.filename)).name
        raise InputError(f"{folder} is not an exported model: {name}: {error.strerror}") from None


def unpack_model(packed: tuple[bytes, bytes], where: str = "model") -> tuple[UNet, ModelSpec]:
    """The inverse of `pack_model`; see `load_model`."""
    try:
        spec = from_dict(ModelSpec, json.loads(packed[0]), f"{where}/{CONFIG}")
        weights = load(packed[1])
        model = build(spec)
        model.load_state_dict(weights)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise InputError(f"{where} holds a damaged model: {' '.join(str(error).split())[:300]}") from None
    return model.eval().requires_grad_(False), spec


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over the weights and the configuration: equal for equal models, wherever they lie."""
    digest = hashlib.sha256()
    for content in pack_model(folder):
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def model_card(spec: ModelSpec) -> str:
    """A README.md with YAML front matter that says what the model is and where it came from."""
    image, diffusion = spec.image, spec.diffusion
    classes = (
        f"{len(image.classes)} classes: {', '.join(image.classes)}" if spec.model.class_conditional else "no"
    )
    provenance = "".join(f"| {key} | {value} |\n" for key, value in sorted(spec.provenance.items()))
    return (
        "---\nlibrary_name: ray-ddpm\npipeline_tag: unconditional-image-generation\ntags: [diffusion, ddpm]\n---\n\n"
        "# Denoising diffusion model\n\n"
        f"An epsilon-predicting UNet for {image.size}x{image.size} images of {image.channels} channel(s), "
        f"{diffusion.schedule} schedule, T = {diffusion.timesteps}, variance {diffusion.variance}.\n"
        f"Class-conditional: {classes}.\n\n"
        "    from pathlib import Path\n"
        "    from pipeline import load_model\n"
        '    model, spec = load_model(Path("this-folder"))\n\n'
        f"| provenance | |\n| --- | --- |\n{provenance}"
    )
