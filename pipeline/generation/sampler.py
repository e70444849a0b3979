"""What turns pieces of the plan into files, in an actor or anywhere else."""

import hashlib
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.config import ModelSpec
from pipeline.data import storage
from pipeline.data.images import encode_png
from pipeline.errors import InputError
from pipeline.evaluation.features import Extractor
from pipeline.evaluation.frechet import Moments, merge_moments, moments_of, moments_to_bytes
from pipeline.generation import ledger, writers
from pipeline.generation.config import GenerateConfig
from pipeline.generation.ledger import Note
from pipeline.generation.plan import Piece, batches, pieces
from pipeline.models.export import unpack_model
from pipeline.rng import Purpose, uniform
from pipeline.sampling import sample_floats, to_uint8


@dataclass(frozen=True)
class Setup:
    """What an actor needs beside its pieces; travels to it through the object store, once."""

    model: tuple[bytes, bytes]
    """What `pack_model` gives: the nodes need not see the model's folder."""
    config: GenerateConfig
    output: str
    settings: str
    """Digest of the settings, for the notes."""
    extractor: Extractor | None


@dataclass(frozen=True)
class Rendered:
    """The samples of a piece.

    Attributes:
        images: uint8 [N, C, H, W], on the device.
        labels: int64 [N]; None for an unconditional model.
        finite: whether the sampler's numbers were, bool [N].
    """

    images: Tensor
    labels: Tensor | None
    finite: Tensor


class Renderer:
    """Holds the model and makes the samples of a piece.

    Raises:
        InputError: a damaged model, or a GPU that the settings don't fit.
    """

    def __init__(self, setup: Setup) -> None:
        # One thread, whatever the number of actors and the machine: sums come out the same.
        torch.set_num_threads(1)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        self.config = setup.config
        self.device = torch.device("cuda" if self.config.gpu else "cpu")
        if self.config.gpu and self.config.bf16 and not torch.cuda.is_bf16_supported():
            raise InputError("--precision bf16: this GPU does not compute in bfloat16, use fp32")
        network, self.spec = unpack_model(setup.model)
        self.model: Any = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.config.compile:
            self.model = torch.compile(self.model, dynamic=False)

    def render(self, piece: Piece) -> Rendered:
        """The samples of a piece, computed in its whole batches."""
        parts = [
            tuple(part[mine] if part is not None else None for part in self._batch(indices))
            for indices, mine in batches(piece, self.config.batch_size)
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
                guidance=config.guidance,
                labels=labels,
                seed=config.seed,
            )
        return to_uint8(x_0), labels, x_0.isfinite().flatten(1).all(1)

    def places(self, output: str, piece: Piece) -> list[str]:
        """Where a piece's files are: one, or one for each image."""
        form = self.config.format
        if form != "png":
            return [ledger.data_uri(output, piece, form)]
        names, folders = range(piece.start, piece.stop), writers.class_folders(self.spec.image.classes)
        labels = sample_labels(self.config, self.spec, torch.arange(piece.start, piece.stop))
        return [
            storage.join(output, ledger.DATA, writers.png_place(index, label, folders))
            for index, label in zip(names, labels_or_none(labels, len(names)), strict=True)
        ]

    def contents(self, piece: Piece, samples: Rendered) -> list[bytes]:
        """The bytes of those files."""
        pixels = samples.images.permute(0, 2, 3, 1).cpu().numpy()
        labels, indices = labels_or_none(samples.labels, len(pixels)), range(piece.start, piece.stop)
        rows = [
            writers.Row(encode_png(image), label, index, self.config.seed)
            for image, label, index in zip(pixels, labels, indices, strict=True)
        ]
        if self.config.format == "png":
            return [row.png for row in rows]
        if self.config.format == "webdataset":
            return [writers.webdataset(rows)]
        return [writers.parquet(rows, self.spec.image.classes)]


class Sampler:
    """Called with spans of samples; writes their files.

    Raises:
        InputError: see `Renderer`.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup, self._renderer = setup, Renderer(setup)
        self._embed = setup.extractor and setup.extractor.load(self._renderer.device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Makes what of a span is not made yet.

        Returns:
            the span, how many images were made and how many are bad, and the moments of the new ones' features or b"".

        Raises:
            InputError: the output can't be written.
        """
        span, made, bad, moments = Piece(int(row["start"]), int(row["stop"])), 0, 0, list[Moments]()
        try:
            for piece in pieces(span, self._setup.config.rows_per_file):
                # A killed actor's span comes again, and what it had finished is kept.
                note = ledger.read_note(
                    self._setup.output, piece, self._setup.config.format, self._setup.settings
                )
                if note is None:
                    note = self._make(piece, moments)
                    made += note.rows
                bad += note.blank + note.nonfinite
        except OSError as error:
            raise InputError(unwritable(self._setup.output, error)) from None
        merged = moments_to_bytes(merge_moments(moments)) if moments else b""
        return {"start": span.start, "stop": span.stop, "made": made, "bad": bad, "moments": merged}

    def _make(self, piece: Piece, moments: list[Moments]) -> Note:
        renderer, output, config = self._renderer, self._setup.output, self._setup.config
        samples = renderer.render(piece)
        length, digest = 0, hashlib.sha256()
        contents = renderer.contents(piece, samples)
        for uri, data in zip(renderer.places(output, piece), contents, strict=True):
            storage.write_atomic(uri, data)
            length += len(data)
            digest.update(data)
        flat = samples.images.flatten(1)
        blank = int(((flat.amin(1) == flat.amax(1)) & samples.finite).sum())
        nonfinite = int((~samples.finite).sum())
        if self._embed:
            with torch.inference_mode():
                batches_of = samples.images.split(config.batch_size)
                features = torch.cat([self._embed(part).cpu() for part in batches_of])
            moments.append(moments_of(features.numpy()))
        note = Note(
            piece.stop - piece.start, length, digest.hexdigest(), blank, nonfinite, self._setup.settings
        )
        ledger.write_note(output, piece, config.format, note)
        return note


def sample_labels(config: GenerateConfig, spec: ModelSpec, ids: Tensor) -> Tensor | None:
    """The class of each sample, a function of (seed, index); None for an unconditional model."""
    if not spec.model.class_conditional:
        return None
    choices = torch.tensor(config.labels or range(len(spec.image.classes)), device=ids.device)
    weights = torch.tensor(config.label_weights or [1.0] * len(choices), dtype=torch.float64)
    # The inverse of the cumulative distribution; a class of weight 0 has an empty interval.
    ends = (weights.cumsum(0) / weights.sum()).to(ids.device)
    u = uniform(config.seed, 0, ids, Purpose.LABEL)[:, 0]
    return choices[torch.searchsorted(ends, u, right=True).clamp(max=int(weights.nonzero().max()))]


def labels_or_none(labels: Tensor | None, count: int) -> list[int | None]:
    """Labels as plain numbers; None for each sample of an unconditional model."""
    return [None] * count if labels is None else labels.tolist()


def unwritable(output: str, error: OSError) -> str:
    """A full disk and its like, in one line."""
    reason = error.strerror or " ".join(str(error).split())
    return f"--output {output}: {reason}: mend that and run the same command again; what is finished is kept"
