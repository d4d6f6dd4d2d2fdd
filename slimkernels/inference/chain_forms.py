"""Which form of a chain is fastest, measured where it is recorded; and the form that runs as the modules do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from slimkernels.conversion.measure import typical_seconds
from slimkernels.conversion.spread import Seconds, ratio
from slimkernels.inference.cpu_passes import GraphChain
from slimkernels.inference.native_layers import images_or_rows, laid_out
from slimkernels.inference.sampled_graph import SampledGraph
from slimkernels.kernels.cpu.chain import Chain, Form, forms
from slimkernels.kernels.cpu.conv2d import PackedConv2d
from slimkernels.kernels.cpu.layer import NativeLayer
from slimkernels.kernels.cpu.memory import huge_pages, place
from slimkernels.kernels.cpu.steps import Steps, image_sizes

# A shorter chain stays as it is. Each of its modules would spend some 20 us in Python, and its activations fit caches.
_SHORTEST_MEASURED_S = 1e-3
_ROUNDS, _BUDGET_S = 7, 0.4


class ModuleByModule:
    """A chain run as its modules run: one native call for each layer, into new memory, and additions by torch.

    Args:
        chain: what runs.
        inputs: images channels_last, or rows ``(n, channels)``.
        y: where the output is copied to.
    """

    def __init__(self, chain: Chain, inputs: Sequence[Tensor], y: Tensor) -> None:
        self._inputs, self._y = [_as_images(x) for x in inputs], _as_images(y)
        self._layers: list[tuple[Callable[[Tensor, Any], Tensor], Any, int, int | None, str]] = []
        for layer, source, residual in chain.links:
            conv = layer.conv
            if residual is not None:  # the ReLU comes after the addition
                assert isinstance(layer, NativeLayer)  # nothing is added to a pooling
                conv = PackedConv2d(layer.isa, layer.packed, layer.shape, *layer.geometry, "none", layer.op)
            self._layers.append((conv, layer.bias, source, residual, layer.epilogue))

    def __call__(self) -> None:
        values = list(self._inputs)
        for conv, bias, source, residual, epilogue in self._layers:
            y = conv(values[source], bias)
            if residual is not None:
                y += values[residual]
                if epilogue == "relu":
                    y.relu_()
            values.append(y)
        self._y.copy_(values[-1])


def _as_images(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 4 else tensor[:, :, None, None]


def in_fastest_forms(graph: SampledGraph, chains: Sequence[GraphChain]) -> list[GraphChain]:
    """The chains, each in the form that runs fastest on this machine now.

    Another form than the first of `slimkernels.kernels.cpu.chain.forms` is taken where it is faster by more than the
    spread of the measured times. So noise alone changes nothing, and a chain that is clearly slower than its
    modules runs as they do.
    """
    return [replace(found, chain=_fastest(graph, found)) for found in chains]


def _fastest(graph: SampledGraph, found: GraphChain) -> Chain:
    chain, inputs = found.chain, []
    for node, images in zip(found.sources, found.images_in):
        x = graph.values[node]
        inputs.append(images_or_rows(laid_out(x, images).copy_(x), images))
    y = images_or_rows(torch.empty_like(laid_out(graph.values[found.nodes[-1]], found.images_out)), found.images_out)
    n, sizes = inputs[0].shape[0], [image_sizes(x)[1:] for x in inputs]
    others = forms(chain.links, n, sizes)[1:]
    first = _runs(chain, inputs, y)
    if not others or _is_short(first):
        return chain
    candidates = [chain, *(Chain.of(chain.links, n, sizes, form) for form in others)]
    runs = [first, *(_runs(other, inputs, y) for other in candidates[1:])]
    seconds = typical_seconds(runs, device="cpu", repeats=_ROUNDS, budget_s=_BUDGET_S)
    return candidates[faster(seconds)]


def faster(seconds: Sequence[Seconds | float]) -> int:
    """Which of some times to take: the least of those that are surely less than the first, else the first."""
    surely = [i for i in range(1, len(seconds)) if ratio(seconds[0], seconds[i]).low > 1]
    return min(surely, key=lambda i: seconds[i], default=0)


def _is_short(run: Callable[[], Any]) -> bool:
    """Whether the best of a few runs takes less time than is measured; the first touches the memory."""
    run()
    for _ in range(3):
        start = time.perf_counter()
        run()
        if time.perf_counter() - start < _SHORTEST_MEASURED_S:
            return True
    return False


def _runs(chain: Chain, inputs: Sequence[Tensor], y: Tensor) -> Callable[[], Any]:
    """The chain on memory of its own."""
    if chain.form is Form.MODULES:
        return ModuleByModule(chain, inputs, y)
    placement = place(chain.lifetimes(0))
    workspace = huge_pages(placement.nbytes)
    memory = {name: workspace[where] for name, where in placement.ranges.items()}
    return Steps(chain.layers[0].isa, chain.steps(inputs, y, memory))
