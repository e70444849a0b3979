"""Networks that travel as TorchScript, and what the field takes of Inception's: features, spatial ones, classes."""

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
"""uint8 [N, C, H, W] on the device -> floats [N, D]."""
Output = Literal["features", "spatial", "probabilities"]

OF_INCEPTION: dict[Output, Metric] = {"spatial": "sfid", "probabilities": "inception_score"}
"""The figures that are of Inception's network alone, by the output that they need."""
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
    """A TorchScript file's content.

    A network whose forward takes `return_features`, as inception-2015-12-05.pt does, gets colour images as uint8 in
    0..255 and return_features=True, and resizes them by itself. Any other gets them as float32 in [0, 1].
    Grey images are repeated into three channels. The answer is flattened to [N, D].

    Attributes:
        output: `spatial` = what Inception's layer mixed_6.conv gives, as guided-diffusion's evaluator takes it for
            sFID; `probabilities` = of Inception's classes, for the Inception Score.
    """

    data: bytes
    output: Output = "features"

    def load(self, device: str) -> Embed:
        """The network on a device.

        Raises:
            InputError: not a TorchScript file, or a network that has no such output.
        """
        try:
            net = torch.jit.load(io.BytesIO(self.data), map_location=device).eval()
            takes = {argument.name for argument in net.forward.schema.arguments}
        except (RuntimeError, AttributeError) as error:
            raise InputError(f"--features: not a TorchScript file: {str(error).splitlines()[0]}") from None
        run = _RUNS[self.output](net, takes)

        def embed(images: Tensor) -> Tensor:
            images = images.expand(-1, 3, -1, -1)
            features = run(images)
            if not isinstance(features, Tensor) or features.shape[:1] != images.shape[:1]:
                raise InputError("--features: the network gives no tensor with one row for each image")
            return features.flatten(1).float()

        return embed

    def preprocessing(self) -> str:
        """How images are brought to the network, in words."""
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
            "probabilities", "forward takes no no_output_bias, as that of inception-2015-12-05.pt does"
        )
    return lambda images: net(images, no_output_bias=True)


def _spatial(net: Any, takes: set[str]) -> Callable[[Tensor], Any]:
    layers = _children(_children(net).get("layers"))
    last = _children(layers.get(_LAYER)).get(_PART)
    if last is None:
        raise _lacks("spatial", f"no layers.{_LAYER}.{_PART}, as that of inception-2015-12-05.pt has")
    chain = [layers[name] for name in takewhile(lambda name: name != _LAYER, layers)]

    def run(images: Tensor) -> Tensor:
        maps = (resized(images) - 128) / 128
        for layer in (*chain, last):
            maps = layer(maps)
        # In the order of TensorFlow, so that the statistics of others fit.
        return maps[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1)

    return run


_RUNS = {"features": _features, "spatial": _spatial, "probabilities": _probabilities}


def _children(module: Any) -> dict[str, Any]:
    return dict(module.named_children()) if module is not None else {}


def _lacks(output: Output, what: str) -> InputError:
    return InputError(f"--metrics {OF_INCEPTION[output]}: the network of --features has {what}: leave it out")


def resized(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] to floats [N, C, 299, 299]: bilinear as TensorFlow 1 does, pixel i from i * H / 299 on."""
    rows, columns = (_weights(side).to(images.device) for side in images.shape[-2:])
    return rows @ images.float() @ columns.T


def _weights(side: int) -> Tensor:
    """Which pixels make those of 299: float32 [299, side], rows sum to one."""
    places = torch.arange(_SIDE, dtype=torch.float64) * side / _SIDE
    low = places.long()
    high, share = (low + 1).clamp(max=side - 1), (places - low).float()
    weights, number = torch.zeros(_SIDE, side), torch.arange(_SIDE)
    weights[number, low] += 1 - share
    weights[number, high] += share
    return weights


def read_torchscript(uri: str, flag: str = "--features") -> TorchScriptExtractor:
    """A TorchScript file that the user named by a flag.

    Such a file holds a program, which will be run: only a file from a source that is trusted should be named.

    Raises:
        InputError: it can't be read, or is something else.
    """
    try:
        extractor = TorchScriptExtractor(storage.read_bytes(uri))
    except OSError as error:
        raise InputError(f"{flag} {uri}: can't be read: {one_line(error)}") from None
    extractor.load("cpu")
    return extractor


def inception_score(probabilities: np.ndarray, together: int = SCORED_TOGETHER) -> tuple[float, float]:
    """exp of the mean KL divergence of an image's classes from those of all (Salimans et al. 2016).

    Args:
        probabilities: of the classes, [N, K], a row an image.
        together: images in a part; the last one may be shorter, as guided-diffusion's evaluator has it.

    Returns:
        the mean over the parts, and their standard deviation, which is what is published beside it; 0 of one part.
    """
    p = probabilities.astype(np.float64)
    parts = [p[start : start + together] for start in range(0, len(p), together)]
    scores = [np.exp(rel_entr(part, part.mean(axis=0)).sum(axis=1).mean()) for part in parts]
    return float(np.mean(scores)), float(np.std(scores))
