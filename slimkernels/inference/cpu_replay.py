"""`Replay`: a model's inference at one input shape, recorded once as a list of kernel calls on fixed memory (CPU).

A converted network at batch 1 spends as long in Python, in fresh output tensors and in cold weights as in arithmetic.
The recording removes all three: the modules' code runs once, while recording; every intermediate has its place in one
workspace, reused as soon as its last reader is done, so that it stays in cache; packed weights lie behind each other,
in the order in which they are read, on huge pages.
"""

from __future__ import annotations

import linecache
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from slimkernels.inference.batches import same
from slimkernels.inference.cpu_recording import Copies, record
from slimkernels.kernels.cpu.chain import Form
from slimkernels.ops.library import ops_are_captured

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Replay:
    """A CPU model recorded for inputs of one shape; calling it runs the recording.

    Weights are copied as they are when recording; later changes of the model are not seen. Branches that depend on the
    values of tensors cannot be recorded. One call at a time: threads that share a recording wait for each other, since
    they would share its workspace.

    Args:
        model: an eval-mode model on the CPU, usually what `slimkernels.convert` returned.
        example_inputs: a tensor or a tuple of tensors, the positional arguments to record.
        copy_outputs: return copies. Without, a call returns the workspace, which the next call overwrites.
        measure: time each chain of native layers in its possible forms, the way of the modules among them, and take
            the fastest where the difference exceeds the spread of the times; some tenths of a second a chain, none for
            a chain below a millisecond. Off, the sizes of the layers decide. A recording computes the same in every
            call. Two recordings whose forms differ may differ in the last bits, since small tiles of pixels have
            several accumulators: switch the measuring off where that matters.
        copies: the weights that torch's own ops read, of other recordings of this model, which has not changed since.
        op: the public function's name, which begins the messages.

    Attributes:
        calls: the number of kernel calls of one run.
        workspace_bytes: memory of inputs, outputs and intermediates.
        weight_bytes: memory of packed weights and of the biases behind them. Weights that torch's own ops read are
            copied beside them, once for all recordings of a `graphed` model.
        chains: of each chain of native layers its number of layers and the form in which it runs, in order.

    Raises:
        ValueError: a model in training mode or off the CPU, one that `torch.export` cannot capture, one that changes
            its inputs or buffers, that makes sizes or Python numbers of its inputs' values (``item()``, a mask that
            selects), or whose outputs differ from call to call (it draws random numbers).
        TypeError: example inputs of another form.
        RuntimeError: the recording does not compute what the model does, which is an error in this library.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | Sequence[Tensor],
        *,
        copy_outputs: bool = True,
        measure: bool = True,
        copies: Copies | None = None,
        op: str = "Replay",
    ) -> None:
        inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
        _check_arguments(op, model, inputs)
        self._lock, self._copy_outputs = threading.Lock(), copy_outputs
        # Memory that was made in inference mode could be written to in inference mode alone.
        with torch.inference_mode(False), torch.no_grad():
            # A recorded input has memory of its own, without elements that share an address and without gaps. Each is a
            # tensor of its own, too: torch.export takes one that comes twice for one input.
            inputs = tuple(
                x.detach() if torch.empty_like(x).stride() == x.stride() else x.detach().contiguous() for x in inputs
            )
            program = _capture(op, model, inputs)
            recording = record(program, inputs, measure, copies)
            self._inputs, self._outputs, self._steps = recording.inputs, recording.outputs, recording.steps
            self._memory = recording.workspace.untyped_storage()
            self._workspace = self._memory.data_ptr()
            self._spec = program.call_spec.out_spec
            self.calls, self.chains = recording.calls, recording.chains
            self.workspace_bytes, self.weight_bytes = recording.workspace_bytes, recording.weight_bytes
            self._check_outputs(op, model, inputs)

    @property
    def in_bf16(self) -> bool:
        """Whether some of its chains multiply float32 in bf16."""
        return any(form == Form.BF16.value for _, form in self.chains)

    def _check_outputs(self, op: str, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        """Compares the recording with the model on the example inputs."""
        expected = model(*inputs)
        differs = _compare(expected, self._call(inputs), self.in_bf16)
        if differs is None:
            return
        if _compare(expected, model(*inputs), self.in_bf16) is not None:
            raise ValueError(
                f"{op}: expected outputs that can be reproduced, got others in each call for {differs}: "
                "does the model draw random numbers?"
            )
        raise RuntimeError(f"{op}: the recording computes another {differs} than the model; please report this")

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        """The model's output for inputs of the recorded shapes and dtypes.

        Raises:
            ValueError, TypeError: inputs that differ from those recorded.
            RuntimeError: a call that is exported, traced or transformed, of which nothing would be seen.
        """
        if ops_are_captured():
            raise RuntimeError(
                "Replay: expected a plain call, got one that torch exports, traces or transforms, which sees nothing "
                "of a recording; give it the model"
            )
        return self._call(inputs)

    def _call(self, inputs: Sequence[Tensor]) -> Any:
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
        if not self._copy_outputs:
            if self._memory.data_ptr() != self._workspace:
                raise RuntimeError(
                    "Replay: expected the recording's memory where it was, and torch has moved it since, as it does "
                    "when a tensor is sent to another process or shared; send a copy of the output"
                )
            # The output of the call before may lie where an input is written to, before it is read.
            inputs = tuple(x.clone() if x.untyped_storage().data_ptr() == self._workspace else x for x in inputs)
        with self._lock:
            for given, recorded in zip(inputs, self._inputs):
                recorded.copy_(given)
            for step in self._steps:
                step()
            outputs = self._outputs
            if self._copy_outputs:
                outputs = [o.clone() if isinstance(o, Tensor) else o for o in outputs]
        return outputs[0] if self._spec.is_leaf() else _pytree.tree_unflatten(outputs, self._spec)

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(x.shape)) for x in self._inputs)
        return (
            f"Replay(inputs {shapes}; {self.calls} calls, workspace {self.workspace_bytes / 2**20:.1f} MiB, "
            f"packed weights {self.weight_bytes / 2**20:.1f} MiB{_in_words(self.chains)})"
        )


def _in_words(chains: Sequence[tuple[int, str]]) -> str:
    """The forms of chains, those of one form in a row together."""
    runs: list[tuple[str, list[int]]] = []
    for layers, form in chains:
        if not runs or runs[-1][0] != form:
            runs.append((form, []))
        runs[-1][1].append(layers)
    return "".join(f"; {' + '.join(map(str, layers))} native layers: {form}" for form, layers in runs)


def _check_arguments(op: str, model: nn.Module, inputs: Sequence[Any]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected an nn.Module, got {type(model).__name__}")
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: expected example inputs to be tensors, got {type(x).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError(f"{op}: expected a model in eval mode, got one in training mode")
    for tensor in (*model.parameters(), *model.buffers(), *inputs):
        if tensor.device.type != "cpu":
            raise ValueError(f"{op}: expected model and inputs on the CPU, got a tensor on {tensor.device}")


def _capture(op: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    try:
        with _no_generated_sources_kept():
            program = torch.export.export(model, inputs, strict=False).run_decompositions({})
    except Exception as error:  # whatever the model's own code and torch's capture raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{op}: expected a model that torch.export can capture, got: {first_line}") from error
    signature = program.graph_signature
    changed = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if changed:
        raise ValueError(
            f"{op}: expected a model that changes nothing, got one that writes to {sorted(changed.values())}"
        )
    reading = _reading_values(program)
    if reading is not None:
        raise ValueError(
            f"{op}: expected a model whose sizes and Python numbers are the same for all inputs of one shape, got one "
            f"that takes them from values of its inputs: {reading}"
        )
    return program


def _reading_values(program: Any) -> str | None:
    """The first op that makes a size or a Python number of an input's values, and the line that calls it; None without.

    A recording would keep what it is for the example inputs. Of weights, which it keeps as well, it may be made.
    """
    from_inputs: set[Any] = set()
    given = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "output" or not (node.name in given or from_inputs.intersection(node.all_input_nodes)):
            continue
        from_inputs.add(node)
        for value in _pytree.tree_leaves(node.meta.get("val")):
            # No size of an example input is a symbol, so a symbol is what is known in a call alone.
            if any(isinstance(v, _SYMBOLS) for v in (value, *(value.shape if isinstance(value, Tensor) else ()))):
                trace = (node.meta.get("stack_trace") or "").strip().splitlines()
                return f"{node.target}" + (f" in {trace[-1].strip()!r}" if trace else "")
    return None


@contextmanager
def _no_generated_sources_kept() -> Iterator[None]:
    """Drops the source texts of the modules that torch.fx generates meanwhile.

    It keeps each for tracebacks, for as long as the process lives: 0.1 MiB for every recording of a small network.
    Modules that other threads generate meanwhile lose these texts, too, and nothing but a line in their tracebacks.
    """
    cache = getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", {})
    before = set(cache)
    try:
        yield
    finally:
        for key in set(cache) - before:
            cache.pop(key, None)
            linecache.cache.pop(key, None)


def _compare(expected: Any, got: Any, in_bf16: bool = False) -> str | None:
    """The first output that differs by more than the order and the precision of its sums explain, or None."""
    for i, (a, b) in enumerate(zip(_pytree.tree_leaves(expected), _pytree.tree_leaves(got), strict=True)):
        if isinstance(a, Tensor) and not same(a, b, in_bf16):
            return f"output {i} of shape {tuple(a.shape)}"
    return None
