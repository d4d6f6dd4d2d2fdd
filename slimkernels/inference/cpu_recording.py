"""A captured graph as a list of steps on fixed memory: sizes and lifetimes first, then kernels bound to addresses."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from slimkernels.inference.concurrency import conflict
from slimkernels.inference.inputs import tensors
from slimkernels.inference.memory import Buffer, gathered, huge_pages, place, span
from slimkernels.inference.native_chain import Chain
from slimkernels.inference.native_layers import NativeLayer, native_layers
from slimkernels.kernels.cpu.conv2d import Step, Steps

Node = torch.fx.Node


class Recording:
    """One pass over the captured graph to see sizes and lifetimes, one that binds kernels to their memory.

    Native layers of which each is read by the next alone make a `Chain`; chains that follow each other without another
    op between run as one call, unless threads at different chains would get into each other's memory. A node's time is
    its position in the graph: memory that changes hands between two chains is right in that order alone.

    Attributes:
        steps: calls without arguments, in order. calls: kernels that they run. inputs, outputs: in fixed memory.
    """

    def __init__(self, program: Any, inputs: tuple[Tensor, ...]) -> None:
        self.steps: list[Callable[[], Any]] = []
        self.calls = 0
        self.nodes: list[Node] = list(program.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.constants = self._constants(program)
        self.user_inputs = dict(zip(program.graph_signature.user_inputs, inputs, strict=True))
        self.output_spec = program.call_spec.out_spec
        self.layers: dict[Node, list[NativeLayer]] = {}
        self.source: dict[Node, Node] = {}  # native node -> what it reads
        self.fused: set[Node] = set()  # linear layers whose ReLU stands for both
        self._pending: list[Step] = []
        self._isa = ""
        samples = self._sample()
        self.root = self._roots(samples)
        self.members = self._chain_members(samples)
        # Nodes without a value of their own: what a chain hands from layer to layer.
        self.inside = {*self.fused, *(node for nodes in self.members for node in nodes[:-1])}
        self.chains = {nodes[0]: self._chain(nodes, samples) for nodes in self.members}
        self.buffers = self._buffers(samples)
        self.workspace = huge_pages(
            place([*self.buffers.values(), *(b for c in self.chains.values() for b in c.buffers)])
        )
        self.workspace_bytes = self.workspace.numel()
        self.weight_bytes = self._move_weights()
        self._bind(samples)

    # ------------------------------------------------------------ sizes and lifetimes

    def _constants(self, program: Any) -> dict[str, Any]:
        signature = program.graph_signature
        values = dict(program.state_dict) | dict(program.constants)
        sources = (
            signature.inputs_to_parameters,
            signature.inputs_to_buffers,
            signature.inputs_to_lifted_tensor_constants,
        )
        return {name: values[target].detach() for source in sources for name, target in source.items()}

    def _sample(self) -> dict[Node, Any]:
        """Every node's value on the example inputs, computed once."""
        values: dict[Node, Any] = {}
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = self.user_inputs.get(node.name, self.constants.get(node.name))
            elif node.op == "call_function":
                args, kwargs = self._arguments(node, values)
                self._take(node, args)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values

    def _take(self, node: Node, args: Sequence[Any]) -> None:
        """Notes a node that native layers compute; a dense linear layer together with its ReLU."""
        before = node.args[0] if node.args else None
        if node.target is torch.ops.aten.relu.default and isinstance(before, Node) and len(before.users) == 1:
            if before.target is torch.ops.aten.linear.default and before in self.layers:
                layers = self.layers.pop(before)
                self.layers[node] = [*layers[:-1], replace(layers[-1], epilogue="relu")]
                self.source[node] = self.source.pop(before)
                self.fused.add(before)
            return
        if not isinstance(before, Node) or not all(
            self._is_constant(n) for n in node.all_input_nodes if n is not before
        ):
            return  # a weight that depends on the input cannot be packed now
        layers = native_layers(node.target, args)
        if layers:
            self.layers[node], self.source[node] = layers, before

    @staticmethod
    def _arguments(node: Node, values: dict[Node, Any]) -> tuple[Any, Any]:
        return torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])  # type: ignore[return-value]

    def _is_constant(self, node: Node) -> bool:
        return node.op == "placeholder" and node.name not in self.user_inputs

    def _roots(self, samples: dict[Node, Any]) -> dict[Node, Node]:
        """The node whose memory each node's value lies in: an input's, where the op only made views."""
        roots: dict[Node, Node] = {}
        for node in self.nodes:
            roots[node] = node
            addresses = {t.untyped_storage().data_ptr() for t in tensors(samples.get(node)) if t.numel()}
            if node.op == "call_function" and len(addresses) == 1:
                for source in node.all_input_nodes:
                    if addresses <= {t.untyped_storage().data_ptr() for t in tensors(samples.get(source))}:
                        roots[node] = roots[source]
                        break
        return roots

    def _chain_members(self, samples: dict[Node, Any]) -> list[list[Node]]:
        """The native nodes in order, in lists of which each node but the first is all that reads the one before."""
        chains: list[list[Node]] = []
        for node in self.nodes:
            if node not in self.layers:
                continue
            before = chains[-1][-1] if chains else None
            if before is not None and self._continues(before, node, samples):
                chains[-1].append(node)
            else:
                chains.append([node])
        # Dense layers alone are left to torch.
        dense = [c for c in chains if all(layer.op == "linear" for node in c for layer in self.layers[node])]
        for nodes in dense:
            for node in nodes:
                self.fused.discard(node.args[0])  # type: ignore[arg-type]
                del self.layers[node]
        return [c for c in chains if c not in dense]

    def _continues(self, before: Node, node: Node, samples: dict[Node, Any]) -> bool:
        x = self.source[node]
        if self.root[x] is not before or self.layers[before][0].isa != self.layers[node][0].isa:
            return False
        # What lies between are views, and nothing else reads them: no other op has to run before this one.
        between = self.nodes[self.position[before] + 1 : self.position[node]]
        aliases = {before, *(n for n in between if self.root[n] is before)}
        readers = {node, *(n for n in self.fused if self.source[node] in n.all_input_nodes and node in n.users)}
        if any(user not in aliases and user not in readers for alias in aliases for user in alias.users):
            return False
        if any(self.root[n] is n and not self._is_constant(n) and n not in self.fused for n in between):
            return False
        value, seen = samples[before], samples[x]
        images = self._reads_images(before)
        if self._reads_images(node):
            return images and seen.shape == value.shape and seen.stride() == value.stride()
        # Rows of any shape, or one-pixel images as rows: the same elements in the same order, and as many in a row.
        length = value.shape[1 if images else -1]
        one_pixel = not images or value.shape[2] * value.shape[3] == 1
        whole = seen.numel() == value.numel() and seen.shape[-1] == length
        return one_pixel and whole and seen.is_contiguous() and (images or value.is_contiguous())

    def _chain(self, nodes: Sequence[Node], samples: dict[Node, Any]) -> Chain:
        x = samples[self.source[nodes[0]]]
        n, (h, w) = (x.shape[0], x.shape[2:]) if self._reads_images(nodes[0]) else (x.numel() // x.shape[-1], (1, 1))
        layers = [layer for node in nodes for layer in self.layers[node]]
        return Chain(layers, n, h, w, self.position[nodes[0]], self.position[nodes[-1]] + 0.5)

    @staticmethod
    def _reads_images(node: Node) -> bool:
        """Whether a native node is a convolution; all others take rows of any shape."""
        return node.target in (torch.ops.slimkernels.bsr_conv2d.default, torch.ops.slimkernels.low_rank_conv2d.default)

    def _buffers(self, samples: dict[Node, Any]) -> dict[Node, Buffer]:
        """The workspace of every value that owns memory, but for those inside a chain."""
        buffers: dict[Node, Buffer] = {}
        reads: dict[Node, float] = {}  # what chains read of other nodes
        born: dict[Node, float] = {}
        for nodes in self.members:
            chain, end = self.chains[nodes[0]], self.position[nodes[-1]] + 0.5
            born[nodes[-1]] = chain.output_born
            for node in nodes:
                for source in (self.source[node], *node.all_input_nodes):
                    at = chain.input_last if source is self.source[nodes[0]] else end
                    reads[self.root[source]] = max(reads.get(self.root[source], 0), at)
        members = {*self.inside, *(nodes[-1] for nodes in self.members)}
        for node, index in self.position.items():
            root, value = self.root[node], samples.get(node)
            if root in self.inside:
                continue
            readers = [self.position[n] for n in node.users if n not in members]
            last = max([*readers, reads.get(root, index), index])
            if root in buffers:
                buffers[root].last = max(buffers[root].last, last)
            elif root is node and isinstance(value, Tensor) and not self._is_constant(node):
                # Inputs are written before the first step.
                start = -1 if node.op == "placeholder" else born.get(node, index)
                buffers[node] = Buffer(span(value), start, last)
        return buffers

    # ------------------------------------------------------------ memory and kernels

    def _move_weights(self) -> int:
        """All packed weights behind each other, in the order of the calls that read them; returns their bytes."""
        layers = [layer for chain in self.chains.values() for layer in chain.layers]
        moved, nbytes = gathered(tensor for layer in layers for tensor in layer.tensors)
        for layer in layers:
            count = len(layer.tensors)
            layer.move(moved[:count])
            moved = moved[count:]
        return nbytes

    def _bind(self, samples: dict[Node, Any]) -> None:
        values: dict[Node, Any] = {}
        self.inputs: list[Tensor] = []
        self.outputs: list[Any] = []
        tails = {nodes[-1]: nodes[0] for nodes in self.members}
        for node in self.nodes:
            if node.op == "output":
                self.outputs = [values[n] if isinstance(n, Node) else n for n in node.args[0]]  # type: ignore[union-attr]
            elif self._is_constant(node):
                values[node] = samples[node]
            elif node.op == "placeholder":
                values[node] = self._place(node, self._as_read(node, samples[node]))
                values[node].copy_(samples[node])
                self.inputs.append(values[node])
            elif node in tails:
                values[node] = self._place(node, samples[node])
                head = tails[node]
                self._append_chain(head, node, values[self.source[head]], values[node])
            elif self.root[node] not in self.inside:
                self._bind_op(node, values, samples[node])
        self._flush()
        del self.layers, self.chains

    def _bind_op(self, node: Node, values: dict[Node, Any], sample: Any) -> None:
        args, kwargs = self._arguments(node, values)
        target: Any = node.target
        if target is operator.getitem or self.root[node] is not node or not tensors(sample):
            values[node] = target(*args, **kwargs)  # views: bound once, they follow the memory
            return
        self._flush()  # what the op reads must be there: its out= overload is tried now
        if isinstance(sample, Tensor):
            values[node] = self._place(node, sample)
            self._append(_op_step(target, args, kwargs, values[node]))
        else:
            values[node] = _pytree.tree_map_only(Tensor, torch.empty_like, sample)
            self._append(_ops_step(target, args, kwargs, tensors(values[node])))

    def _as_read(self, node: Node, sample: Tensor) -> Tensor:
        """An input in the layout in which native layers want it, where nothing else reads it."""
        heads = {nodes[0] for nodes in self.members}
        wanted = {self._layout(user) if user in heads else torch.preserve_format for user in node.users}
        return torch.empty_like(sample, memory_format=wanted.pop()) if len(wanted) == 1 else sample

    def _place(self, node: Node, sample: Tensor) -> Tensor:
        """The node's output tensor in the workspace, with the sizes and strides that it had when sampled."""
        buffer = self.buffers[node]
        memory = self.workspace[buffer.offset : buffer.offset + buffer.nbytes].view(sample.dtype)
        return memory.as_strided(sample.shape, sample.stride()) if sample.numel() else sample.clone()

    def _append_chain(self, head: Node, tail: Node, x: Tensor, y: Tensor) -> None:
        """The chain from x to y: images where its ends are convolutions, else rows, whatever the shape they come in."""
        chain = self.chains[head]
        source, target = self._laid_out(head, x), self._laid_out(tail, y)
        if source is not x:
            self._append(lambda: source.copy_(x))
        steps = chain.steps(self._images_or_rows(head, source), self._images_or_rows(tail, target), self.workspace)
        isa = chain.layers[0].isa
        # Where a thread could be in this chain while another is still in the one before, and memory has changed hands
        # in between or their pieces differ, this chain starts when all are done: in a call of its own.
        if isa != self._isa or conflict([*self._pending, *steps]):
            self._flush()
        self._isa = isa
        self._pending += steps
        if target is not y:
            self._append(lambda: y.copy_(target))

    def _laid_out(self, node: Node, tensor: Tensor) -> Tensor:
        """The tensor if it lies as a native node wants it, else a new one that does."""
        layout = self._layout(node)
        return tensor if tensor.is_contiguous(memory_format=layout) else torch.empty_like(tensor, memory_format=layout)

    def _images_or_rows(self, node: Node, tensor: Tensor) -> Tensor:
        return tensor if self._reads_images(node) else tensor.view(-1, tensor.shape[-1])

    def _layout(self, node: Node) -> torch.memory_format:
        """How images or rows of a native node lie."""
        return torch.channels_last if self._reads_images(node) else torch.contiguous_format

    def _append(self, step: Callable[[], Any], calls: int = 1) -> None:
        self._flush()
        self._run(step, calls)

    def _flush(self) -> None:
        """Turns the native steps gathered so far into one call."""
        if self._pending:
            found = conflict(self._pending)
            if found is not None:
                raise RuntimeError(
                    f"Recording: steps {found[0]} and {found[1]} of {len(self._pending)} would run at the same time "
                    "and write to the same memory; please report this"
                )
            steps, self._pending = Steps(self._isa, self._pending), []
            self._run(steps, steps.count)

    def _run(self, step: Callable[[], Any], calls: int) -> None:
        self.steps.append(step)
        self.calls += calls
        step()


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
    def step() -> None:
        for out, value in zip(outs, tensors(target(*args, **kwargs)), strict=True):
            out.copy_(value)

    return step
