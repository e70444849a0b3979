"""Turns chunks into files, in an actor or in any other process."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pipeline import memory, storage
from pipeline.config import ModelSpec
from pipeline.data.images import encode_png
from pipeline.errors import InputError
from pipeline.generation import arithmetic, ledger, npz, writers
from pipeline.generation.chunks import Chunk, batches, cut_into_chunks, file_name
from pipeline.generation.config import GenerateConfig, label_numbers
from pipeline.generation.ledger import ChunkRecord
from pipeline.gpu.graph import Graphed
from pipeline.gpu.precision import use_tf32
from pipeline.models.export import Packed, load_model
from pipeline.models.sampling import sample_floats, to_pixels
from pipeline.rng import Purpose, uniform


@dataclass(frozen=True)
class Setup:
    """The inputs of an actor other than its chunks.

    Attributes:
        model: the packed model, so that nodes need not reach its folder.
        output: URI of the dataset's folder.
        settings: hash of the settings, for the records.
    """

    model: Packed
    config: GenerateConfig
    output: str
    settings: str


@dataclass(frozen=True)
class Rendered:
    """The samples of a chunk.

    Attributes:
        images: uint8 [N, C, H, W], on the sampling device.
        labels: int64 [N]; None for an unconditional model.
        finite: True for each sample whose values were all finite, bool [N].
    """

    images: Tensor
    labels: Tensor | None
    finite: Tensor


class Renderer:
    """Holds the model and makes the samples of a chunk.

    Raises:
        InputError: the model is damaged, or the GPU does not support the precision.
    """

    def __init__(self, setup: Setup, device: str = "cpu") -> None:
        # One thread on every machine and with any number of actors, so that sums round the same way.
        torch.set_num_threads(1)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        use_tf32(False)
        self.config, self.device = setup.config, torch.device(device)
        if self.config.gpu and self.config.bf16 and not torch.cuda.is_bf16_supported():
            raise InputError("this GPU does not compute in bfloat16: give --precision fp32")
        if self.device.type == "cpu":
            memory.keep()
        self.arithmetic = arithmetic.arithmetic(self.device, self.config.bf16)
        network, self.spec = load_model(setup.model)
        self.model: Any = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.config.compile:
            self.model = torch.compile(self.model, dynamic=False)
        if self.device.type == "cuda":
            self.model = Graphed(self.model)

    def render(self, chunk: Chunk) -> Rendered:
        """Computes the samples of a chunk, in full batches."""
        parts = [
            tuple(part[mine] if part is not None else None for part in self._batch(indices))
            for indices, mine in batches(chunk, self.config.batch_size)
        ]
        images, labels, finite = zip(*parts, strict=True)
        return Rendered(
            torch.cat(cast(tuple[Tensor, ...], images)),
            torch.cat(cast(tuple[Tensor, ...], labels)) if labels[0] is not None else None,
            torch.cat(cast(tuple[Tensor, ...], finite)),
        )

    def _batch(self, indices: range) -> tuple[Tensor, Tensor | None, Tensor]:
        config = self.config
        ids = torch.arange(indices.start, indices.stop, device=self.device)
        labels = sample_labels(config, self.spec, ids)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            x_0 = sample_floats(
                self.model,
                self.spec,
                ids,
                sampler=config.sampler,
                sampling_steps=config.sampling_steps,
                eta=config.eta,
                least_alpha_bar=config.least_alpha_bar,
                guidance=config.guidance,
                labels=labels,
                seed=config.seed,
            )
        return to_pixels(x_0), labels, x_0.isfinite().flatten(1).all(1)

    def contents(self, chunk: Chunk, samples: Rendered) -> list[bytes]:
        """The bytes of a chunk's files, in the order of `places_of`."""
        pixels = samples.images.permute(0, 2, 3, 1).cpu().numpy()
        labels, indices = labels_or_none(samples.labels, len(pixels)), range(chunk.start, chunk.stop)
        if self.config.format == "npz":
            return [npz.archive(pixels, labels)]
        rows = [
            writers.Row(encode_png(image), label, index, self.config.seed)
            for image, label, index in zip(pixels, labels, indices, strict=True)
        ]
        if self.config.format == "png":
            return [row.png for row in rows]
        if self.config.format == "webdataset":
            return [writers.webdataset(rows)]
        return [writers.parquet(rows, self.spec.image.classes)]


class Made(NamedTuple):
    """The result for a span: numbers of samples in it, of samples made now, and of bad samples."""

    rows: int
    made: int
    bad: int


@dataclass(frozen=True)
class SampleWork:
    """Makes the missing samples of a span; see `pool.Work`."""

    setup: Setup

    def start(self, device: str) -> Callable[[Chunk], Made]:
        """Loads the model.

        Raises:
            InputError: as `Renderer` and `arithmetic.claim`, or the output can't be written.
        """
        renderer, output = Renderer(self.setup, device), self.setup.output
        with writing_to(output):
            arithmetic.claim(output, renderer.arithmetic, self.setup.config.mixed_arithmetic)
        return partial(_make_span, self.setup, renderer)


def _make_span(setup: Setup, renderer: Renderer, span: Chunk) -> Made:
    made = bad = 0
    with writing_to(setup.output):
        for chunk in cut_into_chunks(span, setup.config.rows_per_file):
            # The span of a killed actor is assigned again. Its finished chunks are kept.
            record = ledger.read_record(setup.output, chunk, setup.config.format, setup.settings)
            if record is None:
                record = _make(setup, renderer, chunk)
                made += record.rows
            bad += record.blank + record.nonfinite
    return Made(span.stop - span.start, made, bad)


def _make(setup: Setup, renderer: Renderer, chunk: Chunk) -> ChunkRecord:
    samples = renderer.render(chunk)
    length, digest = 0, hashlib.sha256()
    contents = renderer.contents(chunk, samples)
    for uri, data in zip(uris_of(setup.config, renderer.spec, setup.output, chunk), contents, strict=True):
        storage.write_atomic(uri, data)
        length += len(data)
        digest.update(data)
    flat = samples.images.flatten(1)
    blank = int(((flat.amin(1) == flat.amax(1)) & samples.finite).sum())
    nonfinite = int((~samples.finite).sum())
    rows = chunk.stop - chunk.start
    record = ChunkRecord(
        rows, length, digest.hexdigest(), blank, nonfinite, setup.settings, renderer.arithmetic
    )
    ledger.write_record(setup.output, chunk, setup.config.format, record)
    return record


def places_of(config: GenerateConfig, spec: ModelSpec, chunk: Chunk) -> list[str]:
    """Paths of a chunk's files in the data folder; see `ledger.Places`."""
    if config.format != "png":
        return [file_name(chunk, writers.SUFFIX[config.format])]
    names, folders = range(chunk.start, chunk.stop), writers.class_folders(spec.image.classes)
    labels = sample_labels(config, spec, torch.arange(chunk.start, chunk.stop))
    return [
        writers.png_place(index, label, folders)
        for index, label in zip(names, labels_or_none(labels, len(names)), strict=True)
    ]


def uris_of(config: GenerateConfig, spec: ModelSpec, output: str, chunk: Chunk) -> list[str]:
    """URIs of a chunk's files."""
    return [storage.join(output, ledger.DATA, place) for place in places_of(config, spec, chunk)]


def sample_labels(config: GenerateConfig, spec: ModelSpec, ids: Tensor) -> Tensor | None:
    """The class of each sample, int64 [N], a function of (seed, index); None for an unconditional model."""
    if not spec.model.class_conditional:
        return None
    choices = torch.tensor(label_numbers(config, spec) or range(len(spec.image.classes)), device=ids.device)
    weights = torch.tensor(config.label_weights or [1.0] * len(choices), dtype=torch.float64)
    # Inverse transform sampling. A class of weight 0 has an empty interval.
    ends = (weights.cumsum(0) / weights.sum()).to(ids.device)
    u = uniform(config.seed, 0, ids, Purpose.LABEL)[:, 0]
    return choices[torch.searchsorted(ends, u, right=True).clamp(max=int(weights.nonzero().max()))]


def labels_or_none(labels: Tensor | None, count: int) -> list[int | None]:
    """Labels as plain numbers; None for each sample of an unconditional model."""
    return [None] * count if labels is None else labels.tolist()


def writing_to(output: str) -> AbstractContextManager[None]:
    """Turns an error of an output's storage, such as a full disk, into one line with what to do."""
    advice = ": solve this and run the same command again; finished files are kept"
    return storage.reporting(f"--output {output}", advice)
