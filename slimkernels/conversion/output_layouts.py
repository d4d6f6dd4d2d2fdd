"""Modules of a converted model whose outputs have to be contiguous, since code of the model's own takes them so.

Convolutions of a converted model return channels_last images. ``h.view(n, -1)`` raises an error for these, as it does
for a plain model in that layout; models that were written for contiguous images alone are full of it. A copy behind
the last module in front of such a line lets the model run, with every layer in front of it swapped.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from slimkernels.conversion.graph import InputSet, scratch_copy
from slimkernels.conversion.outputs import call_of, own_tensors
from slimkernels.nn.contiguous_output import keep_contiguous_

# The tensor that a failing line reads is nearly always the output of the module that was called last.
_MAX_CANDIDATES = 8


class _Run(NamedTuple):
    """How far a model came on its example inputs.

    Attributes:
        reached: inputs that it ran on, and calls of torch's functions on the first that it did not run on.
        candidates: on that input, modules that returned what was not contiguous, those that returned last first.
        failed: whether there was such an input.
    """

    reached: tuple[int, int]
    candidates: tuple[str, ...] = ()
    failed: bool = False


class _Counted(TorchFunctionMode):
    """Counts calls of torch's functions, those apart that `ContiguousOutput` makes."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += func is not Tensor.contiguous
        return result


def found_by_running(model: nn.Module, sets: Sequence[InputSet]) -> tuple[str, ...]:
    """The modules whose outputs have to be contiguous for ``model`` to run on the example inputs, none of others.

    Where it raises something that no layout changes, those that let it come so far.
    """
    names: tuple[str, ...] = ()
    run = _run(model, sets, names)
    while run.failed:
        for name in run.candidates[:_MAX_CANDIDATES]:
            further = _run(model, sets, (*names, name))
            if not further.failed or further.reached > run.reached:
                names, run = (*names, name), further
                break
        else:
            break
    return names


def _run(model: nn.Module, sets: Sequence[InputSet], names: Sequence[str]) -> _Run:
    scratch = keep_contiguous_(scratch_copy(model), names)
    over: list[str | None] = []

    def returned(name: str) -> None:
        def note(module: nn.Module, args: object, output: object) -> None:
            over.append(name if isinstance(output, Tensor) and not output.is_contiguous() else None)

        scratch.get_submodule(name).register_forward_hook(note)

    for name, _ in scratch.named_modules():
        returned(name)
    for i, (args, kwargs) in enumerate(own_tensors(sets)):
        over.clear()
        try:
            with _Counted() as counted:
                call_of(scratch, args, kwargs)()
        except RuntimeError:  # torch's, of a layout, a shape or anything else
            return _Run((i, counted.calls), tuple(dict.fromkeys(filter(None, reversed(over)))), failed=True)
        except Exception:  # the model's own code runs here
            return _Run((i, counted.calls), failed=True)
    return _Run((len(sets), 0))


def found_by_reading(graph: fx.Graph | None) -> tuple[str, ...]:
    """The modules whose outputs a model's forward, whose graph is given, takes in one layout alone.

    Flattened images are the views that channels_last images do not have, and so are images without their batch. An
    ``as_strided`` has none to begin with. Of what cannot be traced (None), none are found.
    """
    return _read(graph, lambda node: _is_strided(node) or _flattens(node))


def found_with_strides(graph: fx.Graph | None) -> tuple[str, ...]:
    """Those of `found_by_reading` that no error shows: an ``as_strided`` reads other elements in another layout."""
    return _read(graph, _is_strided)


def _read(graph: fx.Graph | None, asks: Callable[[fx.Node], bool]) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for node in graph.nodes if graph is not None else ():
        if asks(node):
            names |= dict.fromkeys(_sources(node))
    return tuple(names)


def _is_strided(node: fx.Node) -> bool:
    return node.target in ("as_strided", torch.as_strided)


def _flattens(node: fx.Node) -> bool:
    """Whether a node is a view of one or two sizes, or of three the first of which takes two of its input's."""
    if node.op != "call_method" or node.target != "view":
        return False
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if len(sizes) == 1:
        return not isinstance(sizes[0], torch.dtype)
    first = sizes[0] if sizes else None
    joins = first.target is operator.mul if isinstance(first, fx.Node) else bool(first == -1)
    return len(sizes) == 2 or (len(sizes) == 3 and joins)


def _sources(view: fx.Node) -> list[str]:
    """The outermost modules, called beside the view, in which what it reads was computed."""
    outside, found, seen = _stack(view), [], set()
    todo = [arg for arg in view.args[:1] if isinstance(arg, fx.Node)]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        inner = [name for name in _stack(node) if name not in outside]
        if inner:
            found.append(inner[0])
        elif node.op == "call_module":
            found.append(str(node.target))
        elif node.op in ("call_function", "call_method"):
            todo += node.all_input_nodes
    return found


def _stack(node: fx.Node) -> list[str]:
    """Names of the modules in whose forward a node was traced, outermost first."""
    return [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
