"""What a recording needs to know of a captured graph, found in passes: ``sample -> find_chains -> lifetimes``.

Each pass is a function of what the one before returned and changes nothing. `memory.place` then gives the lifetimes
their memory, and `cpu_recording.bind` turns everything into calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from slimkernels.inference.native_nodes import NativeNode, native_nodes
from slimkernels.inference.sampled_graph import SampledGraph
from slimkernels.kernels.cpu.chain import Chain, Link
from slimkernels.kernels.cpu.layer import NativeLayer
from slimkernels.kernels.cpu.memory import Lifetime, span
from slimkernels.kernels.cpu.pooling import Pooling

# ---------------------------------------------------------------- find_chains


@dataclass(frozen=True)
class GraphChain:
    """Native nodes that follow each other. The values of all but the last are read inside the chain alone.

    Attributes:
        nodes: in the order in which they run; the value of the last is the chain's output.
        sources: the nodes outside of the chain that it reads, as the chain counts its inputs.
        readers: the nodes of the graph that read those.
        images_in: of each source, whether it is read as images; else as rows.
        images_out: whether the output is images.
        inside: the nodes whose values only the chain sees: every node but the last, and what they absorbed.
        chain: what runs them.
    """

    nodes: tuple[Node, ...]
    sources: tuple[Node, ...]
    readers: frozenset[Node]
    images_in: tuple[bool, ...]
    images_out: bool
    inside: frozenset[Node]
    chain: Chain


def find_chains(graph: SampledGraph) -> list[GraphChain]:
    """The native nodes of a graph in chains, in order. Dense linear layers and poolings by themselves stay torch's."""
    native = native_nodes(graph)
    idle = {*graph.constants, *(n for found in native.values() for n in found.absorbed)}
    # Nodes at which something runs: in between the nodes of a chain there is nothing else.
    running = [n for n in graph.nodes if n in native or (graph.owners[n] is n and n not in idle)]
    aliases: dict[Node, list[Node]] = {}
    for n in graph.nodes:
        aliases.setdefault(graph.owners[n], []).append(n)
    chains: list[GraphChain] = []
    at = 0
    while at < len(running):
        nodes = _longest_chain(graph, native, aliases, running, at)
        at += max(1, len(nodes))
        if any(_is_ours(layer) for node in nodes for layer in native[node].layers):
            chains.append(_graph_chain(graph, native, nodes))
    return chains


def _is_ours(layer: NativeLayer | Pooling) -> bool:
    return isinstance(layer, NativeLayer) and layer.op != "linear"


def _longest_chain(
    graph: SampledGraph,
    native: Mapping[Node, NativeNode],
    aliases: Mapping[Node, Sequence[Node]],
    running: Sequence[Node],
    start: int,
) -> list[Node]:
    """The most nodes from ``running[start]`` on that make a chain; none where that one is not native.

    A pooling begins none: what it reads would have to be copied into the chain's layout, and is larger than its output.
    Layers that run with images innermost alone make no chain with those that cannot.
    """
    nodes: list[Node] = []
    innermost_alone, innermost = False, True
    read: set[Node] = set()  # the ops of the chain that read, and what they absorbed
    longest = 0
    open_values: dict[Node, set[Node]] = {}  # by node of the chain, who reads its value outside of the chain so far
    for node in running[start:]:
        if node not in native or (nodes and not _joins(graph, native, nodes, node)):
            break
        if not nodes and isinstance(native[node].layers[0], Pooling):
            break
        innermost_alone |= any(layer.conv.narrow for layer in native[node].layers)
        innermost &= _takes_images_innermost(graph, native[node])
        if innermost_alone and not innermost:
            break
        nodes.append(node)
        found = native[node]
        read |= {node, found.op, *found.absorbed}
        for readers in open_values.values():
            readers -= read
        own = set(aliases[node])
        open_values[node] = {user for alias in own for user in alias.users} - own - read
        # The last node's value is the output; those of the others have to stay inside.
        if not any(readers for other, readers in open_values.items() if other is not node):
            longest = len(nodes)
    return nodes[:longest]


def _takes_images_innermost(graph: SampledGraph, found: NativeNode) -> bool:
    """Whether the kernels of a native node run on its images with a vector of them innermost."""
    size = tuple(graph.values[found.source].shape[2:]) if found.images else (1, 1)
    for layer in found.layers:
        if not layer.conv.takes_images_innermost(*size):
            return False
        size = layer.output_size(*size)
    return True


def _joins(graph: SampledGraph, native: Mapping[Node, NativeNode], nodes: Sequence[Node], node: Node) -> bool:
    """Whether a native node can follow the nodes of a chain: it finds what it reads of their values as they lie."""
    found = native[node]
    if native[nodes[0]].layers[0].isa != found.layers[0].isa or _count(graph, native, node) != _count(
        graph, native, nodes[0]
    ):
        return False
    inside = [x for x in found.read if graph.owners[x] in nodes]
    return all(_same_elements(graph, graph.owners[x], x, native[graph.owners[x]].images, found.images) for x in inside)


def _count(graph: SampledGraph, native: Mapping[Node, NativeNode], node: Node) -> int:
    """How many images or rows a native node takes."""
    x = graph.values[native[node].source]
    return x.shape[0] if native[node].images else x.numel() // x.shape[-1]


def _same_elements(graph: SampledGraph, before: Node, x: Node, images: bool, reads_images: bool) -> bool:
    """Whether a native node finds the output of the one before as it lies, though it reads a view x of it."""
    value, seen = graph.values[before], graph.values[x]
    if reads_images:
        return images and seen.shape == value.shape and seen.stride() == value.stride()
    # Rows of any shape, or one-pixel images as rows: the same elements in the same order, and as many in a row.
    length = value.shape[1 if images else -1]
    one_pixel = not images or value.shape[2] * value.shape[3] == 1
    whole = seen.numel() == value.numel() and seen.shape[-1] == length
    return one_pixel and whole and seen.is_contiguous() and (images or value.is_contiguous())


def _graph_chain(graph: SampledGraph, native: Mapping[Node, NativeNode], nodes: Sequence[Node]) -> GraphChain:
    sources: dict[Node, bool] = {}  # whether it is read as images
    for node in nodes:
        for x in native[node].read:
            if graph.owners[x] not in nodes:
                sources.setdefault(x, native[node].images)
    places = {x: i for i, x in enumerate(sources)}
    links: list[Link] = []
    for node in nodes:
        found = native[node]
        # Two of the nodes may read one value through different views.
        source, *residual = (places[x] if x in places else places[graph.owners[x]] for x in found.read)
        for layer in found.layers:
            last = layer is found.layers[-1]
            links.append(Link(layer, source, residual[0] if residual and last else None))
            source = len(sources) + len(links) - 1
        places[node] = source
    sizes = []
    for x, images in sources.items():
        shape = graph.values[x].shape
        sizes.append(tuple(shape[1:]) if images else (shape[-1], 1, 1))
    inside = frozenset({*nodes[:-1], *(n for node in nodes for n in native[node].absorbed)})
    return GraphChain(
        tuple(nodes),
        tuple(sources),
        frozenset(n for node in nodes for n in (node, *native[node].absorbed)),
        tuple(sources.values()),
        native[nodes[-1]].images,
        inside,
        Chain.of(links, _count(graph, native, nodes[0]), sizes),
    )


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
            found, chain, first = chain_of[node], chain_of[node].chain, now + 1
            now += chain.ticks
            written[node] = first + chain.output_written_from
            for i, source in enumerate(found.sources):
                owner = graph.owners[source]
                needed[owner] = max(needed.get(owner, 0), first + chain.input_read_until(i))
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
