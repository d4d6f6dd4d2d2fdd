"""What a recording needs to know of a captured graph, found in passes: ``sample -> find_chains -> lifetimes``.

Each pass is a function of what the one before returned and changes nothing. `memory.place` then gives the lifetimes
their memory, and `cpu_recording.bind` turns everything into calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.utils import _pytree

from slimkernels.inference.inputs import tensors
from slimkernels.inference.memory import Lifetime, span
from slimkernels.inference.native_chain import Chain
from slimkernels.inference.native_layers import NativeLayer, native_layers, reads_images

# ---------------------------------------------------------------- sample


@dataclass(frozen=True)
class SampledGraph:
    """A captured graph with the value of every node on the example inputs.

    Attributes:
        nodes: in the order in which they run.
        constants: the placeholders of weights and of other values that are no inputs.
        values: by node. The output node has none.
        owners: by node, the node whose memory its value lies in: another one where an op made a view of its input.
    """

    nodes: tuple[Node, ...]
    constants: frozenset[Node]
    values: dict[Node, Any]
    owners: dict[Node, Node]

    def arguments(self, node: Node) -> tuple[Any, Any]:
        """The values of a node's positional and keyword arguments."""
        return values_of_arguments(node, self.values)


def values_of_arguments(node: Node, values: Mapping[Node, Any]) -> tuple[Any, Any]:
    """A node's positional and keyword arguments with nodes replaced by their values."""
    # For mypy: the arguments of a node are a pair.
    return torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])  # type: ignore[return-value]


def sample(graph: fx.Graph, inputs: Mapping[str, Tensor], constants: Mapping[str, Any]) -> SampledGraph:
    """Runs a graph once.

    Args:
        graph: of one call, its parameters and buffers among the placeholders.
        inputs: values of the placeholders that a call hands over, by name.
        constants: values of the other placeholders, by name.
    """
    nodes = tuple(graph.nodes)
    values: dict[Node, Any] = {}
    for node in nodes:
        if node.op == "placeholder":
            values[node] = inputs.get(node.name, constants.get(node.name))
        elif node.op == "call_function":
            args, kwargs = values_of_arguments(node, values)
            # For mypy: the target of a call_function node is callable.
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    fixed = frozenset(node for node in nodes if node.op == "placeholder" and node.name not in inputs)
    return SampledGraph(nodes, fixed, values, _owners(nodes, values))


def _owners(nodes: Sequence[Node], values: Mapping[Node, Any]) -> dict[Node, Node]:
    """By node, the node whose memory its value lies in."""
    storages = {n: {t.untyped_storage().data_ptr() for t in tensors(values.get(n)) if t.numel()} for n in nodes}
    owners: dict[Node, Node] = {}
    for node in nodes:
        owners[node] = node
        if node.op == "call_function" and len(storages[node]) == 1:
            shared = (source for source in node.all_input_nodes if storages[node] <= storages[source])
            owners[node] = next((owners[source] for source in shared), node)
    return owners


# ---------------------------------------------------------------- find_chains


@dataclass(frozen=True)
class NativeNode:
    """A node that native kernels compute.

    Attributes:
        source: the node that it reads.
        linear: the dense linear layer before it, if the node is a ReLU and the kernels compute both.
    """

    layers: tuple[NativeLayer, ...]
    source: Node
    linear: Node | None = None


@dataclass(frozen=True)
class GraphChain:
    """Native nodes in a row. The value of each but the last is read by the next one alone.

    Attributes:
        source: the node that the first reads.
        inside: the nodes whose values only the chain sees: every node but the last, and the dense linear layers that
            are computed with the ReLU behind them.
        chain: what runs them.
    """

    nodes: tuple[Node, ...]
    source: Node
    inside: frozenset[Node]
    chain: Chain


def find_chains(graph: SampledGraph) -> list[GraphChain]:
    """The native nodes of a graph in chains, in order. Dense linear layers among themselves are left to torch."""
    native = _native_nodes(graph)
    groups: list[list[Node]] = []
    for node in native:
        if groups and _continues(graph, native, groups[-1][-1], node):
            groups[-1].append(node)
        else:
            groups.append([node])
    return [
        _graph_chain(graph, native, nodes)
        for nodes in groups
        if any(layer.op != "linear" for node in nodes for layer in native[node].layers)
    ]


def _native_nodes(graph: SampledGraph) -> dict[Node, NativeNode]:
    """The nodes that native kernels compute, in order. A dense linear layer and the ReLU behind it are one of them."""
    native: dict[Node, NativeNode] = {}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(before, Node):
            continue
        if node.target is torch.ops.aten.relu.default:
            if before.target is torch.ops.aten.linear.default and before in native and len(before.users) == 1:
                linear = native.pop(before)
                layers = (*linear.layers[:-1], replace(linear.layers[-1], epilogue="relu"))
                native[node] = NativeNode(layers, linear.source, before)
        # A weight that depends on the input, or is the input, cannot be packed now.
        elif all(
            n in graph.constants for n in _pytree.tree_leaves((node.args[1:], node.kwargs)) if isinstance(n, Node)
        ):
            layers = tuple(native_layers(node.target, graph.arguments(node)[0]))
            if layers:
                native[node] = NativeNode(layers, before)
    return native


def _continues(graph: SampledGraph, native: Mapping[Node, NativeNode], before: Node, node: Node) -> bool:
    """Whether a native node can follow the native node before it in a chain: no other op has to run in between."""
    x, linear = native[node].source, native[node].linear
    if graph.owners[x] is not before or native[before].layers[0].isa != native[node].layers[0].isa:
        return False
    between = graph.nodes[graph.nodes.index(before) + 1 : graph.nodes.index(node)]
    # Only views of what the chain hands on may lie in between, and only this node may read those.
    aliases = {before, *(n for n in between if graph.owners[n] is before)}
    if any(user not in aliases and user not in (node, linear) for alias in aliases for user in alias.users):
        return False
    idle = {*graph.constants, *(n.linear for n in native.values())}
    if any(graph.owners[n] is n and n not in idle for n in between):
        return False
    return _same_elements(graph, before, x, node)


def _same_elements(graph: SampledGraph, before: Node, x: Node, node: Node) -> bool:
    """Whether a native node finds the output of the one before as it lies, though it reads a view x of it."""
    value, seen = graph.values[before], graph.values[x]
    images = reads_images(before.target)
    if reads_images(node.target):
        return images and seen.shape == value.shape and seen.stride() == value.stride()
    # Rows of any shape, or one-pixel images as rows: the same elements in the same order, and as many in a row.
    length = value.shape[1 if images else -1]
    one_pixel = not images or value.shape[2] * value.shape[3] == 1
    whole = seen.numel() == value.numel() and seen.shape[-1] == length
    return one_pixel and whole and seen.is_contiguous() and (images or value.is_contiguous())


def _graph_chain(graph: SampledGraph, native: Mapping[Node, NativeNode], nodes: Sequence[Node]) -> GraphChain:
    source = native[nodes[0]].source
    x = graph.values[source]
    n, (h, w) = (x.shape[0], x.shape[2:]) if reads_images(nodes[0].target) else (x.numel() // x.shape[-1], (1, 1))
    layers = [layer for node in nodes for layer in native[node].layers]
    inside = frozenset({*nodes[:-1], *(linear for node in nodes if (linear := native[node].linear) is not None)})
    return GraphChain(tuple(nodes), source, inside, Chain.of(layers, n, h, w))


# ---------------------------------------------------------------- lifetimes


def lifetimes(graph: SampledGraph, chains: Sequence[GraphChain]) -> dict[Any, Lifetime]:
    """What needs memory in the workspace: how much, and from which tick to which.

    A tick is the time of one kernel. A node takes one tick, in which it reads its inputs and writes its output; a chain
    takes one for each of its layers and one at either end (see `Chain`). Inputs are written in tick 0, before all else.

    Returns:
        By node, for values that own memory; by ``(last node, name)``, for what chains keep (`Chain.lifetimes`).
    """
    chain_of = {chain.nodes[-1]: chain for chain in chains}
    inside = {node for chain in chains for node in chain.inside}
    written: dict[Node, int] = {}  # the first tick in which a value is written
    needed: dict[Node, int] = {}  # the last tick in which it, or a view of it, is written or read
    in_chains: dict[Any, Lifetime] = {}
    now = 0
    for node in graph.nodes:
        if node in graph.constants or node in inside:
            continue
        if node in chain_of:
            source, chain, first = chain_of[node].source, chain_of[node].chain, now + 1
            now += chain.ticks
            written[node] = first + chain.output_written_from
            needed[graph.owners[source]] = first + chain.input_read_until
            in_chains |= {(node, name): lifetime for name, lifetime in chain.lifetimes(first).items()}
        else:
            now += node.op != "placeholder"
            if graph.owners[node] is node and isinstance(graph.values.get(node), Tensor):
                written[node] = now
            for read in node.all_input_nodes:
                needed[graph.owners[read]] = now
        needed[graph.owners[node]] = now
    own = {node: Lifetime(span(graph.values[node]), first, needed[node]) for node, first in written.items()}
    return own | in_chains
