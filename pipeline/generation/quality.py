"""A figure of quality that runs along: the Fréchet distance of what is generated to a reference's moments."""

import time
from dataclasses import dataclass

from pipeline import storage
from pipeline.config import ImageConfig
from pipeline.errors import InputError
from pipeline.evaluation.features import Extractor, open_extractor
from pipeline.evaluation.frechet import Moments, frechet_distance, merge_moments, moments_from_bytes

SECONDS_BETWEEN = 10.0


@dataclass(frozen=True)
class Reference:
    """Moments of real images' features, and the network that they were measured with."""

    moments: Moments
    extractor: Extractor


def open_reference(reference: str, features: str, image: ImageConfig) -> Reference:
    """What --reference and --features name.

    Raises:
        InputError: one of them can't be used.
    """
    uri = reference if reference.endswith(".npz") else storage.join(reference, "reference_moments.npz")
    network = features or storage.join(reference, "classifier")
    try:
        moments = moments_from_bytes(storage.read_bytes(uri))
    except InputError as error:
        raise InputError(f"--reference {uri}: {error}") from None
    except OSError:
        raise InputError(
            f"--reference {reference}: no moments there: give the --output of an evaluation, or an .npz file"
        ) from None
    if not features and not storage.exists(network):
        raise InputError(
            f"--reference {reference}: no classifier beside it: name the network with --features"
        )
    return Reference(moments, open_extractor(network, image)[0])


class RunningDistance:
    """The distance of all that was added so far, worked out now and then."""

    def __init__(self, reference: Moments) -> None:
        self._reference = reference
        self._moments: Moments | None = None
        self._last, self._shown = time.monotonic(), ""

    def add(self, moments: bytes) -> None:
        """Adds the moments of some images."""
        if moments:
            parts = [part for part in (self._moments, moments_from_bytes(moments)) if part]
            self._moments = merge_moments(parts)

    def value(self) -> float | None:
        """The distance; None where there are too few images for one."""
        if self._moments is None or self._moments.count < 2:
            return None
        return frechet_distance(self._reference, self._moments)

    def shown(self) -> str:
        """For the progress display: at most some seconds old."""
        if time.monotonic() - self._last > SECONDS_BETWEEN and (value := self.value()) is not None:
            self._last, self._shown = time.monotonic(), f"  Fréchet distance {value:.3f}"
        return self._shown
