"""The actor that turns pieces of the plan into files."""

import hashlib
import json
from typing import Any

import ray
import torch
from torch import Tensor

from pipeline.config import ModelSpec
from pipeline.data import storage
from pipeline.data.images import encode_png
from pipeline.generation import writers
from pipeline.generation.config import GenerateConfig
from pipeline.generation.plan import Piece, batches, file_name
from pipeline.models.export import unpack_model
from pipeline.rng import Purpose, uniform
from pipeline.sampling import sample_images


class Sampler:
    """Holds the model; called with pieces by Ray Data's actor pool.

    Args:
        packed: one reference to what `pack_model` gives.
        output: folder of the dataset.
    """

    def __init__(self, packed: list[Any], config: GenerateConfig, output: str) -> None:
        torch.set_num_threads(1)
        self._config, self._output = config, output
        self._device = torch.device("cuda" if config.gpu else "cpu")
        model, self._spec = unpack_model(ray.get(packed[0]))
        self._model = model.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        """Samples a piece, writes its file and then its note; says how many images are blank."""
        here = Piece(int(piece["start"]), int(piece["stop"]))
        rows, blank = list[writers.Row](), 0
        for indices, mine in batches(here, self._config.batch_size):
            images, labels = sample_batch(self._model, self._spec, self._config, indices, self._device)
            pixels = images[mine].permute(0, 2, 3, 1).cpu().numpy()
            blank += int(
                (pixels.reshape(len(pixels), -1).max(1) == pixels.reshape(len(pixels), -1).min(1)).sum()
            )
            for i, image in enumerate(pixels):
                label = None if labels is None else int(labels[mine][i])
                rows.append(writers.Row(encode_png(image), label, indices[mine.start + i], self._config.seed))
        self._write(here, rows)
        return {"start": here.start, "stop": here.stop, "blank": blank}

    def _write(self, piece: Piece, rows: list[writers.Row]) -> None:
        classes = self._spec.image.classes
        if self._config.format == "png":
            for row in rows:
                storage.write_atomic(storage.join(self._output, writers.png_path(row, classes)), row.png)
            data = b"".join(row.png for row in rows)
            name = file_name(piece, "png")
        else:
            write = writers.parquet if self._config.format == "parquet" else writers.webdataset
            data = write(rows, classes)
            name = file_name(piece, writers.SUFFIX[self._config.format])
            storage.write_atomic(storage.join(self._output, "data", name), data)
        note = {"rows": len(rows), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        # The note comes last: a file without one is not finished.
        storage.write_atomic(storage.join(self._output, "notes", f"{name}.json"), json.dumps(note).encode())


def sample_batch(
    model: Any, spec: ModelSpec, config: GenerateConfig, indices: range, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The samples numbered `indices`: uint8 [N, C, H, W], and their labels [N]."""
    ids = torch.arange(indices.start, indices.stop, device=device)
    labels = sample_labels(config, spec, ids)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        images = sample_images(
            model,
            spec,
            ids,
            sampler=config.sampler,
            sampling_steps=config.sampling_steps,
            eta=config.eta,
            guidance=config.guidance,
            labels=labels,
            seed=config.seed,
        )
    return images, labels


def sample_labels(config: GenerateConfig, spec: ModelSpec, ids: Tensor) -> Tensor | None:
    """The class of each sample, a function of (seed, index); None for an unconditional model."""
    if not spec.model.class_conditional:
        return None
    choices = torch.tensor(config.labels or list(range(len(spec.image.classes))), device=ids.device)
    u = uniform(config.seed, 0, ids, Purpose.LABEL)[:, 0]
    return choices[(u * len(choices)).long()]
