"""`graphed`: a model's inference recorded at fixed shapes: CUDA graphs on a GPU, lists of kernel calls on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.inference.cpu_replay import Replay
from slimkernels.inference.cuda_graph import CudaGraphs
from slimkernels.inference.inputs import describe, served_sets, signature


class GraphedModel:
    """A model's inference as recordings, one for each input signature (`graphed` makes it). Gradients are off.

    Attributes:
        device: of the model.
        recordings: what runs, by signature; each a `slimkernels.inference.Replay` on the CPU.
    """

    def __init__(self, device: torch.device, recordings: Mapping[Any, Callable[..., Any]]) -> None:
        self.device, self.recordings = device, dict(recordings)
        # A short cut for calls with tensors alone, by their shapes, of recordings that have been found once: making a
        # signature takes 20 us, and a recorded VGG-19 at batch 1 runs in 340 us.
        self._by_shape: dict[Any, Callable[..., Any]] = {}

    @property
    def signatures(self) -> list[str]:
        """One line per recording: the shapes and dtypes of its inputs."""
        return [describe(key) for key in self.recordings]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for inputs of a recorded signature, copied in and (unless asked otherwise) out.

        Raises:
            ValueError: inputs of a signature that was not recorded; the message lists those that were.
        """
        shape = None
        if not kwargs and all(isinstance(x, Tensor) for x in args):
            shape = tuple([(x.shape, x.dtype, x.device) for x in args])
            known = self._by_shape.get(shape)
            if known is not None:
                return known(*args)
        key = signature(args, kwargs)
        recording = self.recordings.get(key)
        if recording is None:
            raise ValueError(
                f"GraphedModel: expected inputs {' or '.join(self.signatures)} on {self.device}, got {describe(key)}"
            )
        if shape is not None:
            self._by_shape[shape] = recording
        return recording(*args, **kwargs)


def graphed(
    model: nn.Module, example_inputs: Any, *, warm_up_calls: int = 3, copy_outputs: bool = True
) -> GraphedModel:
    """Records a model's inference on static shapes and returns a callable that replays it.

    At small batches a network is bound by what happens between its kernels: launches on a GPU; on the CPU Python,
    fresh output tensors and cold weights. A CUDA graph replays all launches with one call; on the CPU a list of kernel
    calls runs on fixed memory. The example inputs say which shapes can be served. Calls from several threads or
    streams wait for each other, since they share memory.

    A CUDA graph sees weights that change in place, but none that is replaced, moved or repacked; a CPU recording
    holds the weights as they were.

    Args:
        model: an eval-mode model; branches on tensor values cannot be recorded.
        example_inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a list of these,
            on the model's device. On the CPU, positional tensors only.
        warm_up_calls: calls before each capture on CUDA: kernels are compiled and loaded there, which a capture cannot
            do.
        copy_outputs: return copies. Without, a call returns the recording's own memory, which the next call overwrites.

    Raises:
        ValueError: a model in training mode or one that cannot be recorded; no example inputs.
        TypeError: example inputs of another form.
    """
    sets, device = served_sets("graphed", model, example_inputs)
    if warm_up_calls < 1:
        raise ValueError(f"graphed: expected warm_up_calls >= 1, got {warm_up_calls}")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"graphed: expected model and inputs on the CPU or a CUDA device, got {device}")
    graphs = CudaGraphs(model, device, warm_up_calls, copy_outputs) if device.type == "cuda" else None
    recordings: dict[Any, Callable[..., Any]] = {}
    for args, kwargs in sets:
        key = signature(args, kwargs)
        if key in recordings:
            continue
        if graphs is not None:
            recordings[key] = graphs.record(args, kwargs)
        elif kwargs:
            raise TypeError(f"graphed: expected positional example inputs on the CPU, got keywords {sorted(kwargs)}")
        else:
            recordings[key] = Replay(model, args, copy_outputs=copy_outputs)
    return GraphedModel(device, recordings)
