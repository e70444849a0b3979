"""A function of tensors as one CUDA graph: launching a thousand kernels can cost a CPU more than they cost a GPU."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

EAGER_CALLS = 3  # in which cuDNN chooses its algorithms, and Triton builds its kernels


class Graphed:
    """`run`, recorded at its fourth call and replayed from then on; other shapes than the recorded are run as they are.

    What `run` does must be the same each time, but for its inputs: it draws nothing from torch's generator, and waits
    for nothing.
    """

    def __init__(self, run: Callable[..., Tensor], parameters: Iterable[Tensor] = ()) -> None:
        """
        Args:
            run: takes tensors, or None; returns one tensor.
            parameters: `run` sets their gradients, which are none before.
        """
        self._run, self._parameters = run, list(parameters)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """As `run`."""
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
        # autocast keeps the weights that it has cast: the graph must cast its own, and nobody else use those.
        torch.clear_autocast_cache()
        with torch.cuda.graph(self._graph):
            self._result = self._run(*self._inputs)
        torch.clear_autocast_cache()
        self._gradients = [parameter.grad for parameter in self._parameters]


def _shapes(inputs: Iterable[Tensor | None]) -> list[tuple[object, ...]]:
    return [() if value is None else (value.shape, value.dtype) for value in inputs]
