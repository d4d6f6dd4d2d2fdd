"""`Replay`: a model's inference at one input shape, recorded once as a list of kernel calls on fixed memory (CPU).

A converted network at batch 1 spends as long in Python, in fresh output tensors and in cold weights as in arithmetic.
The recording removes all three: the modules' code runs once, while recording; every intermediate has its place in one
workspace, reused as soon as its last reader is done, so that it stays in cache; packed weights lie behind each other,
in the order in which they are read, on huge pages.
"""

from __future__ import annotations

import mmap
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from slimkernels.inference.inputs import tensors
from slimkernels.kernels.native import PackedConv2d, pack_strips, strip_width
from slimkernels.kernels.problems import Request
from slimkernels.kernels.select import resolve

_HUGE_PAGE = 1 << 21
_LINE = 64
Step = Callable[[], Any]


class Replay:
    """A CPU model recorded for inputs of one shape; calling it runs the recording.

    Weights are taken as they are when recording; later changes of the model are not seen. Branches that depend on the
    values of tensors cannot be recorded. One call at a time: threads that share a recording wait for each other, since
    they would share its workspace.

    Args:
        model: an eval-mode model on the CPU, usually what `slimkernels.convert` returned.
        example_inputs: a tensor or a tuple of tensors, the positional arguments to record.
        copy_outputs: return copies. Without, a call returns the workspace, which the next call overwrites.

    Attributes:
        calls: kernel calls of one run. workspace_bytes, weight_bytes: memory of intermediates, of packed weights.

    Raises:
        ValueError: a model in training mode or off the CPU, one that `torch.export` cannot capture, one that changes
            its inputs or buffers, or whose outputs are not reproduced (it draws random numbers).
        TypeError: example inputs of another form.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Tensor | Sequence[Tensor], *, copy_outputs: bool = True
    ) -> None:
        inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
        _check(model, inputs)
        self._lock, self._copy_outputs = threading.Lock(), copy_outputs
        with torch.no_grad():
            recording = _Recording(_capture(model, inputs), inputs)
            self._inputs, self._outputs = recording.inputs, recording.outputs
            self._spec, self._steps = recording.output_spec, recording.steps
            self.calls = len(self._steps)
            self.workspace_bytes, self.weight_bytes = recording.workspace_bytes, recording.weight_bytes
            _compare(model(*inputs), self(*inputs))

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        """The model's output for inputs of the recorded shapes and dtypes.

        Raises:
            ValueError, TypeError: inputs that differ from those recorded.
        """
        if len(inputs) != len(self._inputs):
            raise ValueError(f"Replay: expected {len(self._inputs)} inputs, got {len(inputs)}")
        for i, (given, recorded) in enumerate(zip(inputs, self._inputs)):
            if given.shape != recorded.shape:
                raise ValueError(
                    f"Replay: expected input {i} of shape {tuple(recorded.shape)}, got {tuple(given.shape)}"
                )
            if given.dtype != recorded.dtype or given.device != recorded.device:
                found, wanted = (f"{t.dtype} on {t.device}" for t in (given, recorded))
                raise TypeError(f"Replay: expected input {i} of {wanted}, got {found}")
        with self._lock:
            for given, recorded in zip(inputs, self._inputs):
                recorded.copy_(given)
            for step in self._steps:
                step()
            outputs = self._outputs
            if self._copy_outputs:
                outputs = [o.clone() if isinstance(o, Tensor) else o for o in outputs]
        return _pytree.tree_unflatten(outputs, self._spec)

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(x.shape)) for x in self._inputs)
        return (
            f"Replay(inputs {shapes}; {self.calls} calls, workspace {self.workspace_bytes / 2**20:.1f} MiB, "
            f"packed weights {self.weight_bytes / 2**20:.1f} MiB)"
        )


def _check(model: nn.Module, inputs: Sequence[Any]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Replay: expected an nn.Module, got {type(model).__name__}")
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(f"Replay: expected example inputs to be tensors, got {type(x).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("Replay: expected a model in eval mode, got one in training mode")
    for tensor in (*model.parameters(), *model.buffers(), *inputs):
        if tensor.device.type != "cpu":
            raise ValueError(f"Replay: expected model and inputs on the CPU, got a tensor on {tensor.device}")


def _capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    try:
        program = torch.export.export(model, inputs, strict=False).run_decompositions({})
    except Exception as error:  # whatever the model's own code and torch's capture raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"Replay: expected a model that torch.export can capture, got: {first_line}") from error
    signature = program.graph_signature
    changed = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if changed:
        raise ValueError(
            f"Replay: expected a model that changes nothing, got one that writes to {sorted(changed.values())}"
        )
    return program


def _compare(expected: Any, got: Any) -> None:
    for a, b in zip(_pytree.tree_leaves(expected), _pytree.tree_leaves(got), strict=True):
        if not isinstance(a, Tensor):
            continue
        if a.dtype.is_floating_point:
            tolerance = 1e-3 if a.dtype.itemsize >= 4 else 5e-2
            same = bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()), equal_nan=True))
        else:
            same = torch.equal(a, b)
        if not same:
            raise ValueError(
                "Replay: expected outputs that can be reproduced, got others (does the model draw random numbers?)"
            )


@dataclass
class _Buffer:
    """A place in the workspace, and the steps between which it is needed."""

    nbytes: int
    born: int
    last: int
    offset: int = -1


class _Recording:
    """One pass over the captured graph to see sizes and lifetimes, one that binds kernels to their memory."""

    def __init__(self, program: Any, inputs: tuple[Tensor, ...]) -> None:
        self.steps: list[Step] = []
        self.nodes = list(program.graph.nodes)
        self.constants = self._constants(program)
        self.user_inputs = dict(zip(program.graph_signature.user_inputs, inputs, strict=True))
        self.output_spec = program.call_spec.out_spec
        self.packs: dict[torch.fx.Node, tuple[list[Tensor], str]] = {}
        samples = self._sample()
        self._plan(samples)
        self._arena = _huge_pages(max((b.offset + b.nbytes for b in self.buffers.values()), default=0))
        self.workspace_bytes = self._arena.numel()
        self._move_packs()
        self._bind(samples)

    def _constants(self, program: Any) -> dict[str, Any]:
        signature = program.graph_signature
        values = dict(program.state_dict) | dict(program.constants)
        sources = (
            signature.inputs_to_parameters,
            signature.inputs_to_buffers,
            signature.inputs_to_lifted_tensor_constants,
        )
        return {name: values[target].detach() for source in sources for name, target in source.items()}

    def _sample(self) -> dict[torch.fx.Node, Any]:
        """Every node's value on the example inputs, computed once."""
        values: dict[torch.fx.Node, Any] = {}
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = self.user_inputs.get(node.name, self.constants.get(node.name))
            elif node.op == "call_function":
                if node.target is torch.ops.slimkernels.bsr_conv2d.default:
                    self._pack(node, values, conv=True)
                elif node.target is torch.ops.slimkernels.bsr_linear.default:
                    self._pack(node, values, conv=False)
                args, kwargs = self._arguments(node, values)
                values[node] = node.target(*args, **kwargs)
        return values

    @staticmethod
    def _arguments(node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> tuple[Any, Any]:
        return torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])

    def _pack(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any], *, conv: bool) -> None:
        """The strip pack of a block-sparse node that a native kernel runs; others stay ops."""
        args, _ = self._arguments(node, values)
        x, weight_values, crow, col = args[:4]
        weight_shape, block_shape, epilogue, kernel = args[6], tuple(args[7]), args[-2], args[-1]
        spec = resolve(kernel, Request(node.target._opname, x.dtype, x.device.type, block_shape, epilogue))
        if spec.backend != "cpu" or x.numel() == 0:
            return
        assert spec.isa is not None
        shape = tuple(weight_shape) if conv else (*weight_shape, 1, 1)
        strip = strip_width(block_shape[0], spec.isa)
        self.packs[node] = pack_strips(weight_values, crow, col, shape, block_shape, strip), spec.isa

    def _plan(self, samples: dict[torch.fx.Node, Any]) -> None:
        """Roots (who owns the memory a node's value lies in), lifetimes and offsets."""
        self.root: dict[torch.fx.Node, torch.fx.Node] = {}
        self.buffers: dict[torch.fx.Node, _Buffer] = {}
        position = {node: index for index, node in enumerate(self.nodes)}
        for node, index in position.items():
            last = max((index + 1 if n.op == "output" else position[n] for n in node.users), default=index)
            value = samples.get(node)
            root = self._owner(node, value, samples)
            self.root[node] = root
            if root in self.buffers:
                self.buffers[root].last = max(self.buffers[root].last, last)
            elif root is node and isinstance(value, Tensor) and not self._is_constant(node):
                # Inputs are written before the first step.
                born = -1 if node.op == "placeholder" else index
                self.buffers[node] = _Buffer(_span(value), born, last)
        placed: list[_Buffer] = []
        for buffer in sorted(self.buffers.values(), key=lambda b: (-b.nbytes, b.born)):
            busy = sorted(
                (b.offset, b.offset + b.nbytes) for b in placed if b.born <= buffer.last and buffer.born <= b.last
            )
            offset = 0
            for start, end in busy:
                if offset + buffer.nbytes <= start:
                    break
                offset = max(offset, end)
            buffer.offset = offset
            placed.append(buffer)

    def _is_constant(self, node: torch.fx.Node) -> bool:
        return node.op == "placeholder" and node.name not in self.user_inputs

    def _owner(self, node: torch.fx.Node, value: Any, samples: dict[torch.fx.Node, Any]) -> torch.fx.Node:
        """The node whose memory the value lies in: an input's, where the op only made views."""
        addresses = {t.untyped_storage().data_ptr() for t in tensors(value) if t.numel()}
        if node.op == "call_function" and len(addresses) == 1:
            for source in node.all_input_nodes:
                if addresses <= {t.untyped_storage().data_ptr() for t in tensors(samples.get(source))}:
                    return self.root[source]
        return node

    def _move_packs(self) -> None:
        """All packed weights behind each other, in the order of the calls that read them."""
        self.weight_bytes = sum(
            _rounded(t.numel() * t.element_size()) for packed, _ in self.packs.values() for t in packed
        )
        arena, offset = _huge_pages(self.weight_bytes), 0
        for packed, _ in self.packs.values():
            for i, tensor in enumerate(packed):
                nbytes = tensor.numel() * tensor.element_size()
                moved = arena[offset : offset + nbytes].view(tensor.dtype).view(tensor.shape)
                packed[i] = moved.copy_(tensor)
                offset += _rounded(nbytes)

    def _bind(self, samples: dict[torch.fx.Node, Any]) -> None:
        values: dict[torch.fx.Node, Any] = {}
        self.inputs: list[Tensor] = []
        self.outputs: list[Any] = []
        for node in self.nodes:
            if node.op == "output":
                self.outputs = [values[n] if isinstance(n, torch.fx.Node) else n for n in node.args[0]]
            elif self._is_constant(node):
                values[node] = samples[node]
            elif node.op == "placeholder":
                values[node] = self._place(node, samples[node])
                values[node].copy_(samples[node])
                self.inputs.append(values[node])
            else:
                args, kwargs = self._arguments(node, values)
                sample = samples[node]
                if node.target is operator.getitem or self.root[node] is not node or not tensors(sample):
                    values[node] = node.target(*args, **kwargs)  # views: bound once, they follow the memory
                elif isinstance(sample, Tensor):
                    values[node] = self._place(node, sample)
                    self._append(node, args, kwargs, values[node])
                else:
                    values[node] = _pytree.tree_map_only(Tensor, torch.empty_like, sample)
                    self._append_many(node.target, args, kwargs, tensors(values[node]))
        del self.packs

    def _place(self, node: torch.fx.Node, sample: Tensor) -> Tensor:
        """The node's output tensor in the workspace, with the sizes and strides that it had when sampled."""
        buffer = self.buffers[node]
        memory = self._arena[buffer.offset : buffer.offset + buffer.nbytes].view(sample.dtype)
        return memory.as_strided(sample.shape, sample.stride()) if sample.numel() else sample.clone()

    def _append(self, node: torch.fx.Node, args: Any, kwargs: Any, out: Tensor) -> None:
        if node in self.packs:
            packed, isa = self.packs[node]
            conv = node.target is torch.ops.slimkernels.bsr_conv2d.default
            x, bias = args[0], args[4]
            layout = torch.channels_last if conv else torch.contiguous_format
            if not x.is_contiguous(memory_format=layout):
                relaid = torch.empty_like(x, memory_format=layout)
                self.steps.append(lambda source=x, target=relaid: target.copy_(source))
                x = relaid
            shape = tuple(args[6]) if conv else (*args[6], 1, 1)
            geometry = args[8:11] if conv else ((1, 1), (0, 0), (1, 1))
            step: Step = PackedConv2d(isa, packed, shape, *geometry, args[-2]).bind(x, out, bias)
        else:
            step = _op_step(node.target, args, kwargs, out)
        self.steps.append(step)
        step()

    def _append_many(self, target: Any, args: Any, kwargs: Any, outs: list[Tensor]) -> None:
        def step() -> None:
            for out, value in zip(outs, tensors(target(*args, **kwargs)), strict=True):
                out.copy_(value)

        self.steps.append(step)
        step()


def _op_step(target: Any, args: Any, kwargs: Any, out: Tensor) -> Step:
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


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE


def _span(tensor: Tensor) -> int:
    """Bytes between the first and the last element of a tensor, in whole cache lines."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return _rounded((last + 1) * tensor.element_size())


def _huge_pages(nbytes: int) -> Tensor:
    """Zeroed bytes that start on a huge page's border and are backed by huge pages where the system gives them.

    With 4 KiB pages, 10 MB of weights are 2600 pages, more than the TLB of a core holds: streaming them measured 5 to
    20% slower on a Zen 3.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    size = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE + _HUGE_PAGE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + nbytes]
