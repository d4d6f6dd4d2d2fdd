"""What example inputs do in a model: the calls that they make of its layers, and the weights read past the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.conversion.graph import InputSet, scratch_copy

# Reading these means reading the values; a layer's other attributes exist in what replaces it too.
VALUES = ("weight", "bias")


@dataclass(frozen=True)
class Call:
    """One call of a layer: shapes of its input and output, dtype and device of its input."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Recorded:
    """What was seen of the named layers while a model ran on every example input.

    Attributes:
        calls: name -> per input, its calls with anything in them: a detector that finds nothing calls its later layers
            with empty batches, which say nothing about speed. A layer that was called with anything but one positional
            tensor is left out.
        reads: layers and batch norms whose weight or bias something read past their own call.
    """

    calls: dict[str, tuple[tuple[Call, ...], ...]] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()


def capture(
    model: nn.Module, sets: Sequence[InputSet], names: Sequence[str], *, op: str = "convert", training: bool = False
) -> Recorded:
    """Runs a scratch copy of the model on every input and records what happens to the named layers and to batch norms.

    Args:
        op: the public function's name, which begins the message.

    Raises:
        ValueError: the model raised; the message names the input.
    """
    if not sets:
        return Recorded()
    scratch = scratch_copy(model, training=training)
    records: dict[str, list[list[Call]]] = {name: [] for name in names}
    odd: set[str] = set()
    reads: set[str] = set()

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                odd.add(name)
                return
            x = args[0]
            if x.numel() > 0:
                records[name][-1].append(Call(tuple(x.shape), tuple(output.shape), x.dtype, x.device.type))

        return hook

    for name, module in scratch.named_modules():
        if name in records:
            module.register_forward_hook(record(name), with_kwargs=True)
        if name in records or isinstance(module, nn.modules.batchnorm._BatchNorm):
            # For mypy: mypy does not infer the type of a lambda with a default.
            _watch(module, lambda name=name: reads.add(name))  # type: ignore[misc]
    for i, (args, kwargs) in enumerate(sets):
        for calls in records.values():
            calls.append([])
        try:
            with torch.no_grad():
                scratch(*args, **kwargs)
        except Exception as error:
            raise ValueError(f"{op}: the model does not run on example input {i}: {error}") from error
    found = {name: tuple(map(tuple, calls)) for name, calls in records.items() if name not in odd}
    return Recorded(found, frozenset(reads))


def _watch(module: nn.Module, report: Callable[[], object]) -> None:
    """Calls ``report`` whenever the module's weight or bias is read from outside of a call of the module.

    The module gets a subclass of its class and keeps it, so it should be one of a scratch copy.
    """
    kind: Any = type(module)
    inside = 0

    def entering(method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            inside += 1
            try:
                return method(self, *args, **kwargs)
            finally:
                inside -= 1

        return call

    def getattribute(self: Any, name: str) -> Any:
        if name in VALUES and not inside:
            report()
        return kind.__getattribute__(self, name)

    members = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__getattribute__": getattribute,
        "__call__": entering(kind.__call__),  # its hooks run in it, such as those that compute the weight
        "forward": entering(kind.forward),  # where it is called by that name
    }
    try:
        module.__class__ = type(kind.__name__, (kind,), members)
    except TypeError:  # a class with slots or a metaclass of its own cannot be watched so
        return
