"""A captured graph as calls on fixed memory.

``sample -> find_chains -> in_fastest_forms -> lifetimes -> place -> bind``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree

from slimkernels.inference.chain_forms import ModuleByModule, in_fastest_forms
from slimkernels.inference.concurrency import conflict
from slimkernels.inference.cpu_passes import GraphChain, find_chains, lifetimes
from slimkernels.inference.inputs import tensors
from slimkernels.inference.native_layers import images_or_rows, laid_out
from slimkernels.inference.sampled_graph import SampledGraph, sample, values_of_arguments
from slimkernels.kernels.cpu.chain import Form
from slimkernels.kernels.cpu.memory import Placement, copy_side_by_side, huge_pages, own_copy, place
from slimkernels.kernels.cpu.steps import Step, Steps


@dataclass(frozen=True)
class Recording:
    """A captured model at one input shape.

    Attributes:
        steps: calls without arguments, in order.
        calls: the number of kernels that they run.
        inputs: where the steps read.
        outputs: where the steps write; an output that is no tensor stands here as it is.
        workspace: memory of inputs, outputs and intermediate tensors.
        workspace_bytes: how many of its bytes are used.
        weight_bytes: memory of the packed weights and of the biases behind them.
        chains: of each chain of native layers its number of layers and its form, in order.
    """

    steps: list[Callable[[], Any]]
    calls: int
    inputs: list[Tensor]
    outputs: list[Any]
    workspace: Tensor
    workspace_bytes: int
    weight_bytes: int
    chains: list[tuple[int, str]]


class Copies:
    """Copies of what torch's own ops read of a model: its weights as they are now, whatever becomes of the model.

    Recordings of one model share them, while it does not change.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor, made once."""
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        # The original is kept as well: no other tensor may come to lie at its address.
        if key not in self._known:
            self._known[key] = tensor, own_copy(tensor)
        return self._known[key][1]


def record(program: Any, inputs: Sequence[Tensor], measure: bool = True, copies: Copies | None = None) -> Recording:
    """Records what `torch.export` captured, for inputs as these.

    Args:
        program: what was captured.
        inputs: values of its inputs.
        measure: take the fastest form of each chain by measurement.
        copies: of the model's weights that other recordings have.
    """
    signature = program.graph_signature
    stored = dict(program.state_dict) | dict(program.constants)
    names = signature.inputs_to_parameters, signature.inputs_to_buffers, signature.inputs_to_lifted_tensor_constants
    constants = {name: stored[target].detach() for kind in names for name, target in kind.items()}
    graph = sample(program.graph, dict(zip(signature.user_inputs, inputs, strict=True)), constants)
    chains = find_chains(graph)
    if measure:
        chains = in_fastest_forms(graph, chains)
    placement = place(lifetimes(graph, chains))
    return bind(graph, chains, placement, copies)


def bind(
    graph: SampledGraph, chains: Sequence[GraphChain], placement: Placement, copies: Copies | None = None
) -> Recording:
    """The calls of a graph on a workspace of their own; each runs once meanwhile, on the example inputs.

    Chains that follow each other without another op in between run as one call, unless threads at different chains
    would get into each other's memory.

    Args:
        placement: of the `lifetimes` of this graph and these chains.
        copies: of the weights that other recordings have.
    """
    workspace = huge_pages(placement.nbytes)
    memory = {name: workspace[where] for name, where in placement.ranges.items()}
    chains, weight_bytes = _with_weights_side_by_side(chains)
    chain_of = {chain.nodes[-1]: chain for chain in chains}
    inside = {node for chain in chains for node in chain.inside}
    in_packs = {reader for chain in chains for reader in chain.readers}
    calls, copies = _Calls(), copies or Copies()
    values: dict[Node, Any] = {}
    inputs: list[Tensor] = []
    outputs: list[Any] = []
    for node in graph.nodes:
        sampled: Any = graph.values.get(node)
        if node.op == "output":
            # For mypy: the argument of an output node is a sequence.
            outputs = [values[n] if isinstance(n, Node) else n for n in node.args[0]]  # type: ignore[union-attr]
        elif node in graph.constants:
            read = isinstance(sampled, Tensor) and not in_packs.issuperset(node.users)
            values[node] = copies.of(sampled) if read else sampled
        elif node.op == "placeholder":
            values[node] = _tensor_in(memory[node], _in_layout_of_readers(node, chains, sampled)).copy_(sampled)
            inputs.append(values[node])
        elif node in chain_of:
            values[node] = _tensor_in(memory[node], sampled)
            _add_chain(calls, chain_of[node], values, memory)
        elif graph.owners[node] not in inside:
            args, kwargs = values_of_arguments(node, values)
            if node.target is operator.getitem or graph.owners[node] is not node or not tensors(sampled):
                # A view, or no tensor at all: computed once, it follows the memory.
                # For mypy: the target of a call_function node is callable.
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            elif isinstance(sampled, Tensor):
                values[node] = _tensor_in(memory[node], sampled)
                calls.flush()  # the op is tried now, and reads what the native steps so far write
                calls.add(_op_step(node.target, args, kwargs, values[node]))
            else:
                values[node] = _pytree.tree_map_only(Tensor, torch.empty_like, sampled)
                calls.add(_ops_step(node.target, args, kwargs, tensors(values[node])))
    calls.flush()
    forms = [(len(found.chain.links), found.chain.form.value) for found in chains]
    return Recording(calls.steps, calls.count, inputs, outputs, workspace, placement.nbytes, weight_bytes, forms)


class _Calls:
    """Calls in order, each of which runs once when it is added; native steps in a row become one call.

    Attributes:
        steps: the calls.
        count: of the kernels that they run.
    """

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []
        self.count = 0
        self._native: list[Step] = []  # not yet in a call
        self._isa = ""

    def add(self, step: Callable[[], Any], kernels: int = 1) -> None:
        """Adds a call."""
        self.flush()
        self._run(step, kernels)

    def add_native(self, isa: str, steps: Sequence[Step]) -> None:
        """Adds a chain's steps, to the call of the chain before it where that is safe.

        Where a thread could be in this chain while another is still in the one before, and memory has changed hands in
        between or their pieces differ, this chain has to start when all are done: in a call of its own.
        """
        if isa != self._isa or conflict([*self._native, *steps]):
            self.flush()
        self._isa = isa
        self._native += steps

    def flush(self) -> None:
        """Turns the native steps gathered so far into one call."""
        if self._native:
            found = conflict(self._native)
            if found is not None:
                raise RuntimeError(
                    f"Recording: steps {found[0]} and {found[1]} of {len(self._native)} would run at the same time "
                    "and write to the same memory; please report this"
                )
            steps, self._native = Steps(self._isa, self._native), []
            self._run(steps, steps.count)

    def _run(self, step: Callable[[], Any], kernels: int) -> None:
        self.steps.append(step)
        self.count += kernels
        step()


def _with_weights_side_by_side(chains: Sequence[GraphChain]) -> tuple[list[GraphChain], int]:
    """The chains on copies of their weights, which lie in the order of the calls that read them; and their bytes."""
    copies, nbytes = copy_side_by_side(tensor for found in chains for tensor in found.chain.weights())
    remaining = iter(copies)
    return [replace(found, chain=found.chain.with_weights(remaining)) for found in chains], nbytes


def _tensor_in(memory: Tensor, like: Tensor) -> Tensor:
    """Bytes of the workspace as a tensor with the dtype, the sizes and the strides of another one."""
    return memory.view(like.dtype).as_strided(like.shape, like.stride()) if like.numel() else like.clone()


def _in_layout_of_readers(node: Node, chains: Sequence[GraphChain], value: Tensor) -> Tensor:
    """An input's value in the layout that the chain wants which reads it, if nothing else reads it."""
    readers = {reader: found for found in chains if node in found.sources for reader in found.readers}
    wanted = {_layout(readers[user], node) if user in readers else torch.preserve_format for user in node.users}
    return torch.empty_like(value, memory_format=wanted.pop()) if len(wanted) == 1 else value


def _layout(found: GraphChain, node: Node) -> torch.memory_format:
    """How a chain wants what it reads of a node."""
    return torch.channels_last if found.images_in[found.sources.index(node)] else torch.contiguous_format


def _add_chain(calls: _Calls, found: GraphChain, values: Mapping[Node, Tensor], memory: Mapping[Any, Tensor]) -> None:
    """Adds the steps of a chain, and copies at its ends where its inputs or its output lie in another layout."""
    tail, chain = found.nodes[-1], found.chain
    inputs = []
    for node, images in zip(found.sources, found.images_in):
        x = values[node]
        source = laid_out(x, images)
        if source is not x:
            calls.add(partial(source.copy_, x))
        inputs.append(images_or_rows(source, images))
    y = values[tail]
    target = laid_out(y, found.images_out)
    parts = {name: memory[tail, name] for name in chain.lifetimes(0)}
    output = images_or_rows(target, found.images_out)
    if chain.form is Form.MODULES:
        calls.add(ModuleByModule(chain, inputs, output), len(chain.links))
    else:
        calls.add_native(chain.layers[0].isa, chain.steps(inputs, output, parts))
    if target is not y:
        calls.add(partial(y.copy_, target))


def _op_step(target: Any, args: Any, kwargs: Any, out: Tensor) -> Callable[[], Any]:
    """A call of any other op into ``out``: through its out= overload where it has one that fits, else by copying."""
    into = getattr(getattr(target, "overloadpacket", None), "out", None)
    if into is not None and len(into._schema.arguments) == len(target._schema.arguments) + 1:
        address = out.data_ptr()
        try:
            into(*args, **kwargs, out=out)
        except (RuntimeError, TypeError):  # an overload that wants other arguments or another layout
            pass
        else:
            if out.data_ptr() == address:
                return lambda: into(*args, **kwargs, out=out)
    return lambda: out.copy_(target(*args, **kwargs))


def _ops_step(target: Any, args: Any, kwargs: Any, outs: list[Tensor]) -> Callable[[], Any]:
    """A call of an op that returns several tensors, which are copied into ``outs``."""

    def step() -> None:
        for out, value in zip(outs, tensors(target(*args, **kwargs)), strict=True):
            out.copy_(value)

    return step
