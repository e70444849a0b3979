"""TorchScript networks, and the outputs of Inception that common metrics use: features, spatial features, classes."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import rel_entr
from torch import Tensor

from pipeline import storage
from pipeline.errors import InputError
from pipeline.evaluation.config import Metric
from pipeline.redact import one_line

Embed = Callable[[Tensor], Tensor]
"""Function uint8 [N, C, H, W] on the device -> floats [N, D]."""
Output = Literal["features", "spatial", "probabilities"]

OF_INCEPTION: dict[Output, Metric] = {"spatial": "sfid", "probabilities": "inception_score"}
"""Metrics that only Inception's network defines, by the output that they need."""
PREPROCESSING: dict[Output, str] = {
    "features": "uint8 from 0 to 255, which the network resizes itself; grey repeated into three channels",
    "spatial": "bilinear to 299x299 as TensorFlow 1 does, (x - 128) / 128; the first 7 channels of mixed_6.conv",
    "probabilities": "as for the features; softmax of the logits without their bias, over parts of 5,000 images in order",
}
PREPROCESSING_OF_OTHERS = "float32 from 0 to 1 in their own size; grey repeated into three channels"
SCORED_TOGETHER = 5000
_SIDE, _SPATIAL_CHANNELS = 299, 7
_LAYER, _PART = "mixed_6", "conv"


@dataclass(frozen=True)
class TorchScriptExtractor:
    """A network as the content of a TorchScript file.

    If the network's forward takes `return_features`, as that of inception-2015-12-05.pt does, it gets colour images
    as uint8 0..255 and return_features=True, and resizes them itself. Any other network gets float32 in [0, 1]. Grey
    images are repeated into three channels. The result is flattened to [N, D].

    Attributes:
        data: content of the file.
        output: "features"; "spatial" = output of Inception's layer mixed_6.conv, as in guided-diffusion's evaluator
            for sFID; "probabilities" = of Inception's classes, for the Inception Score.
    """

    data: bytes
    output: Output = "features"

    def load(self, device: str) -> Embed:
        """Loads the network on a device.

        Raises:
            InputError: the file is not TorchScript, or the network has no such output.
        """
        try:
            net = torch.jit.load(io.BytesIO(self.data), map_location=device).eval()
            takes = {argument.name for argument in net.forward.schema.arguments}
        except (RuntimeError, AttributeError) as error:
            raise InputError(f"--features: not a TorchScript file: {str(error).splitlines()[0]}") from None
        run = _RUNS[self.output](net, takes)

        def embed(images: Tensor) -> Tensor:
            if images.shape[1] not in (1, 3):
                raise InputError(
                    "--features: the network takes no alpha channel: prepare the data with --channels 3"
                )
            images = images.expand(-1, 3, -1, -1)
            try:
                features = run(images)
            except RuntimeError as error:
                shape, why = list(images.shape[1:]), str(error).strip().splitlines()[-1]
                raise InputError(f"--features: the network fails on images of {shape}: {why}") from None
            if not isinstance(features, Tensor) or features.shape[:1] != images.shape[:1]:
                raise InputError("--features: the network gives no tensor with one row for each image")
            return features.reshape(len(images), -1).float()

        return embed

    def preprocessing(self) -> str:
        """Describes in words how images are converted for the network."""
        net = torch.jit.load(io.BytesIO(self.data))
        known = any(argument.name == "return_features" for argument in net.forward.schema.arguments)
        return PREPROCESSING[self.output] if known else PREPROCESSING_OF_OTHERS


def _features(net: Any, takes: set[str]) -> Callable[[Tensor], Any]:
    if "return_features" in takes:
        return lambda images: net(images, return_features=True)
    return lambda images: net(images.float() / 255)


def _probabilities(net: Any, takes: set[str]) -> Callable[[Tensor], Any]:
    if "no_output_bias" not in takes:
        raise _lacks(
            "probabilities", "its forward takes no no_output_bias, unlike that of inception-2015-12-05.pt"
        )
    return lambda images: net(images, no_output_bias=True)


def _spatial(net: Any, takes: set[str]) -> Callable[[Tensor], Any]:
    layers = _children(_children(net).get("layers"))
    last = _children(layers.get(_LAYER)).get(_PART)
    if last is None:
        raise _lacks("spatial", f"it has no layers.{_LAYER}.{_PART}, unlike inception-2015-12-05.pt")
    chain = [layers[name] for name in takewhile(lambda name: name != _LAYER, layers)]

    def run(images: Tensor) -> Tensor:
        maps = (resized(images) - 128) / 128
        for layer in (*chain, last):
            maps = layer(maps)
        # The axes have TensorFlow's order, so that published statistics fit.
        return maps[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1)

    return run


_RUNS = {"features": _features, "spatial": _spatial, "probabilities": _probabilities}


def _children(module: Any) -> dict[str, Any]:
    return dict(module.named_children()) if module is not None else {}


def _lacks(output: Output, what: str) -> InputError:
    return InputError(
        f"--metrics {OF_INCEPTION[output]}: the network of --features does not fit ({what}): leave the metric out"
    )


def resized(images: Tensor) -> Tensor:
    """Resizes uint8 [N, C, H, W] to floats [N, C, 299, 299], bilinearly as TensorFlow 1 (pixel i starts at i H / 299)."""
    rows, columns = (_weights(side).to(images.device) for side in images.shape[-2:])
    return rows @ images.float() @ columns.T


def _weights(side: int) -> Tensor:
    """Weights of the source pixels for each of 299 pixels: float32 [299, side]; rows sum to one."""
    places = torch.arange(_SIDE, dtype=torch.float64) * side / _SIDE
    low = places.long()
    high, share = (low + 1).clamp(max=side - 1), (places - low).float()
    weights, number = torch.zeros(_SIDE, side), torch.arange(_SIDE)
    weights[number, low] += 1 - share
    weights[number, high] += share
    return weights


def read_torchscript(uri: str, flag: str = "--features") -> TorchScriptExtractor:
    """Reads a TorchScript file.

    Such a file contains a program that will be run, so users should only name files from trusted sources.

    Args:
        flag: flag that names the file, for errors.

    Raises:
        InputError: the file can't be read, or is not TorchScript.
    """
    try:
        extractor = TorchScriptExtractor(storage.read_bytes(uri))
    except OSError as error:
        raise InputError(f"{flag} {uri}: can't be read: {one_line(error)}") from None
    extractor.load("cpu")
    return extractor


def inception_score(probabilities: np.ndarray, together: int = SCORED_TOGETHER) -> tuple[float, float]:
    """The Inception Score (Salimans et al. 2016): exp(mean KL(p(class | image) || p(class))).

    Args:
        probabilities: of the classes, [N, K], one row for each image.
        together: images in a part. The last part may be shorter, as in guided-diffusion's evaluator.

    Returns:
        the mean over the parts, and the standard deviation between parts, as is published (0 for one part).
    """
    p = probabilities.astype(np.float64)
    parts = [p[start : start + together] for start in range(0, len(p), together)]
    scores = [np.exp(rel_entr(part, part.mean(axis=0)).sum(axis=1).mean()) for part in parts]
    return float(np.mean(scores)), float(np.std(scores))
