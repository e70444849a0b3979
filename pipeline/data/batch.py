"""What the stream hands to the training loop. Torch alone, no Ray."""

from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images: uint8 [N, C, H, W], laid out channels last.
        labels: int64 [N]; -1 where the data has none.
        ids: sample ids, int64 [N].
        epochs: the epoch of each sample, int64 [N].
        weights: float32 [N]; 0 for an image that could not be decoded, else 1.
        bad: path and reason of each image that could not be decoded.
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
