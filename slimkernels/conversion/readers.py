"""Whose weight is its layer's own: the question that conversion, factorization and pruning ask before they touch one.

A layer may be replaced, and zeros in it pay, only where its own forward alone uses the weight. Others that read it are
found in four ways, because each sees what the others cannot:

* tensors that two modules share, such as an embedding and the head of a language model;
* torch's own layers around it: nn.MultiheadAttention and the fast path of nn.TransformerEncoderLayer hand the weights
  of their children to one native call;
* the `torch.fx` graph, where the model can be traced; where it cannot, the code that its forward reaches;
* a run on example inputs, where there are any (`slimkernels.conversion.calls`).
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from slimkernels.conversion.calls import VALUES
from slimkernels.conversion.graph import CONTAINERS, ModelGraph, ancestors, trace

_SHARED = "its weight is shared with another layer"
_READ = "the forward reads its weight past the layer"
_MAY_READ = "the model cannot be traced, and its code may read the weight past the layer"
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


def weight_readers(
    model: nn.Module, graphs: Sequence[ModelGraph] = (), seen: Iterable[str] | None = None
) -> dict[str, str]:
    """Layer name -> why its weight is not its own alone. A layer that is not listed may be replaced or zeroed.

    Args:
        model: any module; it stays untouched.
        graphs: of `slimkernels.conversion.graph.trace`. By default the model is traced here in eval and in training
            mode, since each may read what the other does not.
        seen: layers whose weight a run on example inputs was seen to read; None where there was no run.
    """
    graphs = graphs or [trace(model, training=mode) for mode in (False, True)]
    found = dict.fromkeys(shared_tensor_layers(model), _SHARED)
    reads = set(seen or ()).union(*(graph.tensor_reads for graph in graphs))
    if any(graph.reason is not None for graph in graphs):
        named, guessed = _reads_in_code(model)
        reads |= named
        found |= dict.fromkeys(guessed if seen is None else (), _MAY_READ)
    found |= dict.fromkeys(reads, _READ)
    for name, _ in model.named_modules():
        kind = _torch_layer_around(model, name)
        if kind is not None:
            found[name] = f"it is part of {kind}, which may read its weight"
    return found


def shared_tensor_layers(model: nn.Module) -> frozenset[str]:
    """Names of modules that hold a parameter which another module holds too: the object, or part of its memory."""
    owners: dict[object, list[tuple[int, int, str]]] = {}
    for name, module in model.named_modules():
        for leaf in module._parameters.values():
            if leaf is None or isinstance(leaf, nn.UninitializedParameter):
                continue
            layer = name.split(".parametrizations")[0]
            plain = type(leaf) is nn.Parameter and leaf.layout == torch.strided
            key = leaf.untyped_storage()._cdata if plain else id(leaf)
            owners.setdefault(key, []).append((*(_bytes(leaf) if plain else (0, 1)), layer))
    return frozenset(name for ranges in owners.values() for name in _overlapping(ranges))


def _bytes(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor reaches: the first, and the one past the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = int(tensor.storage_offset())
    end = begin + last + 1 if tensor.numel() else begin
    return begin * tensor.element_size(), end * tensor.element_size()


def _overlapping(ranges: list[tuple[int, int, str]]) -> Iterator[str]:
    """Names whose range meets that of another name. Parameters may be parts of one buffer without sharing anything."""
    reach, owner = -1, ""
    for begin, end, name in sorted(ranges):
        if begin < reach and name != owner:
            yield name
            yield owner
        if end > reach:
            reach, owner = end, name


def _torch_layer_around(model: nn.Module, name: str) -> str | None:
    """Type name of an enclosing layer of torch's, or of a subclass of one, that runs its children in its own way."""
    for ancestor in reversed(ancestors(name)):
        kinds = type(model.get_submodule(ancestor)).__mro__
        if any("forward" in vars(kind) and _is_torch_layer(kind) for kind in kinds):
            return kinds[0].__name__
    return None


def _is_torch_layer(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.") and kind not in (nn.Module, *CONTAINERS)


def _reads_in_code(model: nn.Module) -> tuple[set[str], set[str]]:
    """Layers whose weight or bias some forward's code reads, judged by the attributes that its byte code loads.

    Returns:
        Those that are read, as in ``self.head.weight``, and those that may be: where something else than ``self``
        stands in front (``layer.weight`` in a loop, or in a method that is handed a layer), each layer of that module's
        own may be meant.
    """
    existing = dict(model.named_modules())
    known: dict[type, set[tuple[str, ...] | None]] = {}
    named: set[str] = set()
    guessed: set[str] = set()
    for prefix, module in existing.items():
        kind = type(module)
        if kind.__module__.startswith(("torch.", "slimkernels.nn")):
            continue
        own = vars(module).get("forward")  # a forward that was put on the instance
        if own is not None:
            paths = set(_read_paths(kind, [own]))
        else:
            paths = known[kind] if kind in known else known.setdefault(kind, set(_read_paths(kind, [])))
        before = f"{prefix}." if prefix else ""
        named.update(before + ".".join(path) for path in paths if path is not None)
        if None in paths:
            guessed.update(before + name for name in _own_layers(module))
    return named & set(existing), guessed


def _own_layers(module: nn.Module) -> list[str]:
    """Names, below the module, of layers with a weight that it holds itself or in plain containers."""
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, _LAYERS)
        and all(type(module.get_submodule(between)) in CONTAINERS for between in ancestors(name)[1:])
    ]


def _read_paths(kind: type, todo: list[Any]) -> Iterator[tuple[str, ...] | None]:
    """Attributes of ``self`` whose weight or bias the forward of a class reads; None for those of something else.

    What the forward loads by the name of a method or property of the class is followed, and so are the forwards of
    base classes and nested functions. ``__init__`` and what that alone calls are not.
    """
    bases = [base for base in kind.__mro__ if base is not nn.Module]
    todo = [*todo, *(vars(base)["forward"] for base in bases if "forward" in vars(base))]
    done: set[types.CodeType] = set()
    while todo:
        function = todo.pop()
        inner = (getattr(function, name, None) for name in ("__wrapped__", "__func__", "fget", "func"))
        todo.extend(part for part in inner if part is not None)
        code = getattr(function, "__code__", None)
        if code is None or code in done:
            continue
        done.add(code)
        this = code.co_varnames[0] if code.co_argcount else "self"
        for first, path in _loaded_attributes(code, this):
            todo.extend(vars(base)[path[0]] for base in bases if path[0] in vars(base))
            at = next((i for i, name in enumerate(path) if name in VALUES), None)
            if at is not None and first != this:
                yield None
            elif at:
                yield path[:at]


def _loaded_attributes(code: types.CodeType, this: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every chain of attributes that the code loads: ``("self", ("head", "weight"))``, and "" where it begins at
    something else than the variable ``this``."""
    first, path = "", []
    for step in dis.get_instructions(code):
        if step.opname in ("EXTENDED_ARG", "CACHE"):
            continue
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path.append(str(step.argval))
            continue
        if path:
            yield first, tuple(path)
        # Some versions of Python load two variables in one step; the second is on top.
        loaded = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
        variable = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
        first, path = this if variable and loaded == this else "", []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _loaded_attributes(constant, this)
