"""Forward and backward pass of a training step as a CUDA graph: one launch in place of some five hundred.

Launched one by one from Python, the kernels of a step of VGG-19 at batch 512 take about twice as long as they run on an
H200. The optimiser, the callbacks and the learning rate stay in Python, so that they may do what they like.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.capture import capture
from slimkernels.compress.training.callbacks import Callback
from slimkernels.kernels.cuda_tensor_cores import NAME as TENSOR_CORES
from slimkernels.nn.stored_blocks import StoredBlocks

# Calls without a graph before the first capture: libraries choose their algorithms and allocate their workspaces.
EAGER_STEPS = 3


class _Graph:
    """A captured pass: where it reads its batch, and where its loss and its gradients are."""

    def __init__(self, backward: Callable[[list[Tensor]], Tensor], batch: list[Tensor], step: nn.Module, pool: Any):
        self.inputs = [torch.empty_like(part).copy_(part) for part in batch]
        self.graph, self._loss = capture(lambda: backward(self.inputs), warm_up_calls=0, pool=pool)
        self._gradients = [(p, p.grad) for p in step.parameters() if p.grad is not None]

    def __call__(self, batch: list[Tensor]) -> Tensor:
        for own, part in zip(self.inputs, batch, strict=True):
            own.copy_(part, non_blocking=True)
        self.graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._loss.clone()  # the next step overwrites it


class GraphedSteps:
    """Runs forward and backward passes, from the fourth of a kind on as a CUDA graph.

    Passes are of a kind when their batches have the same sizes and nothing that Python decides has changed: modules and
    their modes, which parameters are trained, where every tensor lies, and what the callbacks say (`Callback.variant`).
    Values may change, masks among them, and patterns, but for those of layers on the tensor-core kernel: after one of
    these changed, a pass runs without a graph and the next is captured. One graph is kept for each size of batch.

    Args:
        name: begins the message of an error.
        step: the module whose passes are run; its gradients are None before every call.
        backward: forward and backward pass of a batch; its loss, detached.
        callbacks: of the run.

    Raises:
        ValueError: a callback whose forward passes cannot be captured.
    """

    def __init__(
        self, name: str, step: nn.Module, backward: Callable[[list[Tensor]], Tensor], callbacks: Sequence[Callback]
    ) -> None:
        for callback in callbacks:
            callback.variant()  # one that cannot be captured says so before anything is trained
        self._name = name
        self._step, self._backward, self._callbacks = step, backward, callbacks
        self._graphs: dict[Hashable, tuple[Hashable, _Graph]] = {}
        self._seen: dict[Hashable, int] = {}
        self._met: Hashable = None  # the patterns of the last pass without a graph

    def __call__(self, batch: list[Tensor]) -> Tensor:
        """The loss of a batch, detached; gradients are left in the parameters.

        Raises:
            RuntimeError: the pass cannot be captured, such as one that waits for the GPU.
        """
        size = tuple((part.shape, part.dtype) for part in batch)
        self._seen[size] = self._seen.get(size, 0) + 1
        patterns = self._patterns()
        if self._seen[size] <= EAGER_STEPS or patterns != self._met:
            self._met = patterns
            return self._backward(batch)
        state = self._state(), patterns
        known, graph = self._graphs.get(size, (None, None))
        if graph is None or known != state:
            self._graphs.pop(size, None)
            graph = self._captured(batch)
            self._graphs[size] = state, graph
        return graph(batch)

    def _captured(self, batch: list[Tensor]) -> _Graph:
        others = [graph for _, graph in self._graphs.values()]
        try:
            # Graphs that never run at the same time may use the same memory for what lies between their results.
            return _Graph(self._backward, batch, self._step, others[0].graph.pool() if others else None)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self._name}: expected a training step that never waits for the GPU with cuda_graph=True, got one "
                f"that cannot be captured ({str(error).splitlines()[0]})"
            ) from error

    def _state(self) -> Hashable:
        """All that a captured pass holds fixed and that may change between steps."""
        modules = tuple((id(module), module.training) for module in self._step.modules())
        tensors = (*self._step.parameters(), *self._step.buffers())
        places = tuple((tensor.data_ptr(), tensor.requires_grad) for tensor in tensors)
        return modules, places, tuple(callback.variant() for callback in self._callbacks)

    def _patterns(self) -> Hashable:
        """How often the patterns were written that a captured pass holds fixed; Triton's kernels read theirs anew.

        What follows from a new one waits for the GPU, which a capture cannot do.
        """
        layers = [m for m in self._step.modules() if isinstance(m, StoredBlocks) and m.kernel == TENSOR_CORES]
        return tuple((layer.crow_indices._version, layer.col_indices._version) for layer in layers)
