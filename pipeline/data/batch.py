"""One rank's batches, as the stream hands them to the training loop. This module imports torch, not Ray."""

from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.config import ImageConfig
from pipeline.data.blocks import pixels_of


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images: uint8 [N, C, H, W], in channels-last memory format.
        labels: class numbers, int64 [N]; -1 for an image without a label.
        ids: sample ids, int64 [N].
        epochs: the epoch of each sample, int64 [N].
        weights: float32 [N]; 0 for an image that could not be decoded, else 1.
        bad: reason by path, for each image that could not be decoded.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    epochs: Tensor
    weights: Tensor
    bad: dict[str, str] = field(default_factory=dict)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for copies to a GPU that overlap with compute."""
        names = ("images", "labels", "ids", "epochs", "weights")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})


def from_tables(pieces: list[pa.Table], image: ImageConfig) -> Batch:
    """Copies decoded rows out of the object store into one batch.

    Args:
        pieces: tables that `blocks.Decode` made.
        image: size and channels of the pixels in them.
    """
    count = sum(piece.num_rows for piece in pieces)
    images = torch.empty((count, image.size, image.size, image.channels), dtype=torch.uint8)
    first = 0
    for piece in pieces:
        images[first : first + piece.num_rows].numpy()[:] = pixels_of(piece, image)
        first += piece.num_rows
    table = pa.concat_tables([piece.drop_columns(["pixels"]) for piece in pieces])
    labels, ids, epochs = (
        torch.from_numpy(table[name].to_numpy().copy()) for name in ("label", "id", "epoch")
    )
    failed = table.filter(pc.is_valid(table["bad"]))
    return Batch(
        images=images.permute(0, 3, 1, 2),
        labels=labels,
        ids=ids,
        epochs=epochs,
        weights=torch.from_numpy(table["bad"].is_null().to_numpy().astype("float32")),
        bad=dict(zip(failed["path"].to_pylist(), failed["bad"].to_pylist(), strict=True)),
    )
