"""A captured graph with the value of every node on the example inputs, and whose memory each value lies in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from slimkernels.inference.inputs import tensors


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
