"""The nodes of a captured graph that native kernels compute, with the additions and ReLUs that these end with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree

from slimkernels.inference.native_layers import native_layers, reads_images
from slimkernels.inference.sampled_graph import SampledGraph
from slimkernels.kernels.cpu.layer import NativeLayer
from slimkernels.kernels.cpu.pooling import Pooling

_ADD, _RELU = torch.ops.aten.add.Tensor, torch.ops.aten.relu.default


@dataclass(frozen=True)
class NativeNode:
    """A node whose value native kernels compute: that of an op, or of the addition or the ReLU behind it.

    Attributes:
        layers: in the order in which they run.
        source: the node that the first layer reads.
        images: whether the layers read and write images; else rows.
        op: the node of the op that has the weights.
        residual: the node that is added to what the last layer computes, in front of its ReLU.
        absorbed: the nodes that need no call of their own: the op and the addition, where they are not the node itself.
    """

    layers: tuple[NativeLayer | Pooling, ...]
    source: Node
    images: bool
    op: Node
    residual: Node | None = None
    absorbed: tuple[Node, ...] = ()

    @property
    def read(self) -> tuple[Node, ...]:
        """The nodes that the kernels read."""
        return (self.source,) if self.residual is None else (self.source, self.residual)


def native_nodes(graph: SampledGraph) -> dict[Node, NativeNode]:
    """The nodes that native kernels compute, in the order in which the graph computes their values."""
    native: dict[Node, NativeNode] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            continue
        if node.target is _RELU:
            before = node.args[0]
            if _takes_more(native, before):
                native[node] = _with_relu(node, before, native.pop(before))
        elif node.target is _ADD:
            _absorb_addition(graph, native, node)
        # A weight that depends on the input, or is the input, cannot be packed now.
        elif all(
            n in graph.constants for n in _pytree.tree_leaves((node.args[1:], node.kwargs)) if isinstance(n, Node)
        ):
            layers = tuple(native_layers(node.target, graph.arguments(node)[0]))
            if layers:
                native[node] = NativeNode(layers, node.args[0], reads_images(node.target), node)
    return native


def _takes_more(native: Mapping[Node, NativeNode], before: Node) -> bool:
    """Whether the op behind a node can become a part of it: nothing else reads the node's value."""
    return before in native and len(before.users) == 1 and native[before].layers[-1].epilogue == "none"


def _with_relu(node: Node, before: Node, found: NativeNode) -> NativeNode:
    *before_it, last = found.layers
    assert isinstance(last, NativeLayer)  # behind a pooling nothing else fits
    layers = (*before_it, replace(last, epilogue="relu"))
    return replace(found, layers=layers, absorbed=(*found.absorbed, before))


def _absorb_addition(graph: SampledGraph, native: dict[Node, NativeNode], node: Node) -> None:
    """Makes an addition a part of the native node that computes one of its terms, the later one where both do."""
    terms = [term for term in node.args if isinstance(term, Node)]
    if len(node.args) != 2 or len(terms) != 2 or node.kwargs or terms[0] is terms[1]:
        return
    for own in sorted((n for n in terms if n in native), key=list(native).index, reverse=True):
        other = terms[1] if own is terms[0] else terms[0]
        if _takes_more(native, own) and native[own].residual is None and _adds_up(graph, own, other, node):
            found = native.pop(own)
            native[node] = replace(found, residual=other, absorbed=(*found.absorbed, own))
            return


def _adds_up(graph: SampledGraph, own: Node, other: Node, node: Node) -> bool:
    """Whether the terms of an addition and its sum are float32 tensors of one shape, and the other is no constant."""
    values = [graph.values[n] for n in (own, other, node)]
    if other in graph.constants or not all(isinstance(v, Tensor) and v.dtype is torch.float32 for v in values):
        return False
    return len({v.shape for v in values}) == 1
