"""CUDA graphs of a model's inference, one for each input signature, in one memory pool."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from slimkernels.capture import capture
from slimkernels.inference.inputs import tensors


@dataclass
class _Captured:
    graph: Any
    inputs: list[Tensor]
    outputs: Any


class CudaGraphs:
    """Captures calls of a model; what it returns for each replays them.

    The captured graphs share memory, so calls from several streams or threads wait for each other.
    """

    def __init__(self, model: nn.Module, device: torch.device, warm_up_calls: int, copy_outputs: bool) -> None:
        self._model, self._device = model, device
        self._warm_up_calls, self._copy_outputs = warm_up_calls, copy_outputs
        self._lock = threading.Lock()
        self._pool: Any = None
        self._last: Any = None

    def record(self, args: Any, kwargs: Any) -> Callable[..., Any]:
        """One call captured; weights may change in place afterwards, a replaced or repacked one is not seen.

        Raises:
            ValueError: the model cannot be captured.
        """
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = _pytree.tree_unflatten(leaves, spec)
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self._device):
            try:
                graph, outputs = capture(
                    lambda: self._model(*args, **kwargs), warm_up_calls=self._warm_up_calls, pool=self._pool
                )
            except RuntimeError as error:
                line = (str(error).strip().splitlines() or ["no message"])[0]
                raise ValueError(f"graphed: the model cannot be captured in a CUDA graph: {line}") from error
        self._pool = graph.pool()
        captured = _Captured(graph, [leaf for leaf in leaves if isinstance(leaf, Tensor)], outputs)
        return lambda *args, **kwargs: self._replay(captured, args, kwargs)

    def _replay(self, captured: _Captured, args: Any, kwargs: Any) -> Any:
        with self._lock, torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._last is not None:
                stream.wait_event(self._last)
            for own, given in zip(captured.inputs, tensors((args, kwargs)), strict=True):
                own.copy_(given)
            captured.graph.replay()
            outputs = captured.outputs
            if self._copy_outputs:
                outputs = _pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, outputs)
            self._last = stream.record_event()
        return outputs
