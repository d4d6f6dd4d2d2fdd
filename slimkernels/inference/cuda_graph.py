"""CUDA graphs of a model's inference, one for each input signature, in one memory pool."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from slimkernels import timing
from slimkernels.capture import capture
from slimkernels.inference.inputs import tensors
from slimkernels.nn.stored_blocks import StoredBlocks

_REPLAYS, _READINGS = 20, 5  # of `GraphRecording.seconds`: some 10 ms at batch 16


@dataclass
class _Captured:
    """A graph, where it reads and writes, and the memory of the model's tensors, which it reads at their addresses.

    Attributes:
        packed: tensors of layers whose pack the graph reads: it would not see what is written to them.
        writes: how many writes to those torch had counted when it was captured.
        plain: whether the inputs are the positional arguments, tensors all of them.
    """

    graph: Any
    inputs: list[Tensor]
    outputs: Any
    alive: list[Tensor]
    packed: list[Tensor]
    writes: int
    plain: bool


class CudaGraphs:
    """Captures calls of a model; what it returns for each replays them.

    The captured graphs share memory, so calls from several streams or threads wait for each other.
    """

    def __init__(self, model: nn.Module, device: torch.device, warm_up_calls: int, copy_outputs: bool) -> None:
        self._model, self._device = model, device
        self._warm_up_calls, self._copy_outputs = warm_up_calls, copy_outputs
        self._lock = threading.Lock()
        self._pool: Any = None
        self._done: Any = None  # an event, recorded behind every replay, and the stream of the last one
        self._last: Any = None

    def record(self, args: Any, kwargs: Any) -> GraphRecording:
        """One call captured; weights may change in place afterwards, a replaced one is not seen.

        Raises:
            ValueError: the model cannot be captured. In a call RuntimeError: a weight was written in place of which the
                graph reads a packed copy.
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
        alive = [tensor.detach() for tensor in (*self._model.parameters(), *self._model.buffers())]
        packed = _packed_from(self._model)
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        plain = not kwargs and len(inputs) == len(args)
        captured = _Captured(graph, inputs, outputs, alive, packed, _writes(packed), plain)
        return GraphRecording(self, captured)

    def _run(self, captured: _Captured, args: Any, kwargs: Any) -> Any:
        if captured.packed and _writes(captured.packed) != captured.writes:
            raise RuntimeError(
                "GraphedModel: expected the weights that were recorded, and a layer of which the graph reads a packed "
                "copy has others since, which that does not see; record it again with graphed(model, example_inputs)"
            )
        given = list(args) if captured.plain and not kwargs else tensors((args, kwargs))
        # To leave the caller's device and mode takes 10 us, to ask whether that matters one.
        tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        if torch.cuda.current_device() == self._device.index and not tracked:
            return self._replay(captured, given)
        with torch.no_grad(), torch.cuda.device(self._device):
            return self._replay(captured, given)

    def _replay(self, captured: _Captured, given: list[Tensor]) -> Any:
        with self._lock:
            stream = torch.cuda.current_stream()
            if self._done is None:
                self._done = torch.cuda.Event()
            elif stream != self._last:
                stream.wait_event(self._done)
            for own, x in zip(captured.inputs, given, strict=True):
                own.copy_(x)
            captured.graph.replay()
            outputs = captured.outputs
            if self._copy_outputs:
                outputs = outputs.clone() if isinstance(outputs, Tensor) else _pytree.tree_map(_cloned, outputs)
            self._done.record(stream)
            self._last = stream
        return outputs


class GraphRecording:
    """A captured call; calls copy inputs in, replay it, and copy outputs out.

    Attributes:
        note: what its ``repr`` adds.
    """

    def __init__(self, graphs: CudaGraphs, captured: _Captured) -> None:
        self._graphs, self._captured, self.note = graphs, captured, ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._graphs._run(self._captured, args, kwargs)

    def seconds(self) -> float:
        """The graph alone, by the device's clock, whatever the inputs hold. Waits for the device."""
        with torch.cuda.device(self._graphs._device), self._graphs._lock:
            return min(timing.cuda_seconds_a_call(self._captured.graph.replay, _REPLAYS) for _ in range(_READINGS))

    def __repr__(self) -> str:
        return f"a CUDA graph{self.note}"


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _packed_from(model: nn.Module) -> list[Tensor]:
    """The weights and patterns of block-sparse layers on a GPU that hold a pack, but inference tensors."""
    layers = [m for m in model.modules() if isinstance(m, StoredBlocks) and m.prepacked]
    return [t for layer in layers for t in layer._pack_follows() if not t.is_inference()]


def _writes(packed: list[Tensor]) -> int:
    return sum([tensor._version for tensor in packed])
