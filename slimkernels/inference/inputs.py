"""What a model is to be served with: sets of example inputs, their device, their signatures."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from slimkernels.conversion.graph import InputSet, input_sets
from slimkernels.nn.packing import Prepacked


def served_sets(op: str, model: nn.Module, example_inputs: Any) -> tuple[list[InputSet], torch.device]:
    """The example inputs as ``(args, kwargs)`` and the one device of model and inputs.

    Raises:
        ValueError: a model in training mode, no example inputs, several devices. TypeError: inputs of another form.
    """
    if model.training:
        raise ValueError(f"{op}: expected a model in eval mode, got one in training mode")
    sets = input_sets(example_inputs)
    if not sets:
        raise ValueError(f"{op}: expected example inputs, got none")
    devices = {t.device for t in (*_own_tensors(model), *tensors(sets))}
    if len(devices) != 1:
        found = sorted(map(str, devices)) or "no tensor"
        raise ValueError(f"{op}: expected model and inputs on one device, got {found}")
    return sets, devices.pop()


def _own_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, but for packs: some keep numbers on the CPU that a launch reads."""
    for module in model.modules():
        held = module._held() if isinstance(module, Prepacked) else ()
        yield from module.parameters(recurse=False)
        yield from (buffer for name, buffer in module.named_buffers(recurse=False) if name not in held)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def signature(args: Any, kwargs: Any) -> Any:
    """Hashable: structure, shapes, dtypes and devices of a call's inputs; other values as they are, with their types.

    Raises:
        TypeError: a value that is no tensor and has no hash, such as an array of NumPy.
    """
    leaves, spec = _pytree.tree_flatten((args, kwargs))
    parts = tuple((tuple(v.shape), v.dtype, str(v.device)) if isinstance(v, Tensor) else v for v in leaves)
    for part in parts:
        if not isinstance(part, Hashable):
            raise TypeError(
                f"graphed: expected inputs of tensors and of values that can be compared, got a {type(part).__name__}"
            )
    # 1, True and 1.0 are equal.
    return parts, f"{spec} {[type(v).__qualname__ for v in leaves if not isinstance(v, Tensor)]}"


def describe(key: Any) -> str:
    """A signature in a line."""

    def one(part: Any) -> str:
        if isinstance(part, tuple) and len(part) == 3 and isinstance(part[1], torch.dtype):
            return f"{str(part[1]).removeprefix('torch.')}{list(part[0])} on {part[2]}"
        return repr(part)

    return "(" + ", ".join(map(one, key[0])) + ")"
