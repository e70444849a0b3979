"""Runs a function of tensors as a CUDA graph, because launching a thousand kernels can cost more than running them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

EAGER_CALLS = 3  # calls in which cuDNN chooses its algorithms and Triton builds its kernels


class Graphed:
    """Records `run` at its fourth call and replays it from then on. Inputs of other shapes run without the graph.

    `run` must do the same at every call except for its inputs: it must not draw from torch's generator, and not wait
    for the GPU.
    """

    def __init__(self, run: Callable[..., Tensor], parameters: Iterable[Tensor] = ()) -> None:
        """
        Args:
            run: function that takes tensors or None, and returns one tensor.
            parameters: parameters whose gradients `run` sets. The gradients must be None before.
        """
        self._run, self._parameters = run, list(parameters)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """Calls `run` or replays its graph."""
        self._calls += 1
        if self._graph is None and self._calls > EAGER_CALLS:
            self._record(inputs)
        if self._graph is None or _shapes(inputs) != _shapes(self._inputs):
            return self._run(*inputs)
        for kept, value in zip(self._inputs, inputs, strict=True):
            if kept is not None and value is not None:
                kept.copy_(value)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._result.clone()  # the next replay overwrites it

    def _record(self, inputs: tuple[Tensor | None, ...]) -> None:
        self._inputs = [None if value is None else value.clone() for value in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # autocast caches cast weights. The graph must cast its own, and other code must not use the graph's.
        torch.clear_autocast_cache()
        with torch.cuda.graph(self._graph):
            self._result = self._run(*self._inputs)
        torch.clear_autocast_cache()
        self._gradients = [parameter.grad for parameter in self._parameters]


def _shapes(inputs: Iterable[Tensor | None]) -> list[tuple[object, ...]]:
    return [() if value is None else (value.shape, value.dtype) for value in inputs]
