"""Structure of a model: copies of it, hooks, which layer feeds which, and its example inputs.

The `torch.fx` graph is analysis only: a model is never rebuilt from it. A model that cannot be traced gives a graph
without followers and the reason why.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from slimkernels.conversion.wrappers import without_compiled_parts
from slimkernels.nn.contiguous_output import ContiguousOutput
from slimkernels.nn.strided_pointwise import PixelsRead

# Every combination of given and defaulted optional arguments is traced; 2^4 traces of ResNet-18 take 0.3 s.
_MAX_OPTIONAL_ARGUMENTS = 4
_REPARAMETRIZING_HOOKS = (prune.BasePruningMethod, WeightNorm, SpectralNorm)
# Without these a model computes something else, or does not run.
_KEPT_HOOKS = (*_REPARAMETRIZING_HOOKS, ContiguousOutput)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.ReLU, nn.MaxPool2d)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def copy_model(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A deep copy of ``model``, what `torch.compile` made of parts of it undone.

    Tensors that torch refuses to copy (a pruned layer's computed weight) are detached.

    Args:
        model: any module; it stays untouched.
        share_parameters: keep the parameters themselves, so that a copy made to look at costs no memory.

    Raises:
        TypeError: the model holds something that Python cannot copy.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in itertools.chain(vars(module).values(), module._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        for parameter in module._parameters.values():
            if parameter is not None and share_parameters:
                memo[id(parameter)] = parameter
            elif parameter is not None and parameter.layout != torch.strided:
                memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    try:
        return without_compiled_parts(copy.deepcopy(model, memo))
    except Exception as error:
        raise TypeError(f"convert: expected a model that can be copied, got {type(model).__name__}: {error}") from error


def scratch_copy(model: nn.Module, *, training: bool = False) -> nn.Module:
    """A copy to run or trace: own buffers, shared parameters, no hooks of the user's (they would see calls of ours)."""
    scratch = copy_model(model, share_parameters=True)
    for module in scratch.modules():
        for name in _HOOKS:
            hooks = getattr(module, name, None) or {}
            for key in [k for k, hook in hooks.items() if not isinstance(hook, _KEPT_HOOKS)]:
                del hooks[key]
    nn.Module.train(scratch, training)
    return scratch


def has_hooks(module: nn.Module) -> bool:
    """Whether the module carries a hook other than those that recompute a weight and those that change no result."""
    hooks = [hook for name in _HOOKS for hook in (getattr(module, name) or {}).values()]
    return any(not isinstance(hook, (*_KEPT_HOOKS, PixelsRead)) for hook in hooks)


def bake(module: nn.Module) -> None:
    """Replaces computed tensors by their values, in place: masks, parametrizations, weight and spectral norm.

    Tensors and classes that other modules share stay as they are.
    """
    if parametrize.is_parametrized(module):
        # Not torch's remove_parametrizations: it deletes the property from a class that copies of the module share.
        # For mypy: an attribute of a Module is a Tensor or a Module to mypy.
        chains = dict(module.parametrizations.items())  # type: ignore[operator, union-attr]
        with torch.no_grad():
            values = {name: getattr(module, name).clone() for name in chains}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        for name, value in values.items():
            originals = list(chains[name].parameters(recurse=False))
            if originals:
                module._parameters[name] = nn.Parameter(value, any(p.requires_grad for p in originals))
            else:
                module._buffers[name] = value
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod):
            original = f"{hook._tensor_name}_orig"
            module._parameters[original] = _detached(module._parameters[original])
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm | SpectralNorm):
            hook.remove(module)
            module._forward_pre_hooks.pop(key, None)


def _detached(parameter: Tensor | None) -> nn.Parameter:
    assert parameter is not None
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def parametrized_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module, looking through torch's parametrization, which replaces it by a subclass."""
    return parametrize.type_before_parametrizations(module)


def ancestors(name: str) -> list[str]:
    """Names of the modules that contain ``name``, outermost (``""``, the model) first."""
    if not name:
        return []
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def in_a_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts ``new`` where ``name`` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def unique_names(model: nn.Module) -> dict[str, nn.Module]:
    """Modules registered under exactly one name."""
    named = list(model.named_modules(remove_duplicate=False))
    counts = Counter(id(module) for _, module in named)
    return {name: module for name, module in named if counts[id(module)] == 1}


@dataclass(frozen=True)
class ModelGraph:
    """Who calls what.

    Attributes:
        reason: why the model could not be traced; None when it was.
        calls: how often the forward calls each module.
        follower: ``a -> b`` where the output of ``a`` goes to ``b`` alone, ``b`` takes nothing else, each called once.
        tensor_reads: modules whose parameters or buffers the forward reads itself, past the module's own call.
        order: of every trace, each call's name in it, kind, target and what it takes, for `other_calls`.
    """

    reason: str | None = None
    calls: dict[str, int] = field(default_factory=dict)
    follower: dict[str, str] = field(default_factory=dict)
    tensor_reads: frozenset[str] = frozenset()
    order: tuple[Any, ...] = ()

    def chain(self, name: str) -> Iterator[str]:
        """The followers of ``name``, nearest first."""
        while name in self.follower:
            name = self.follower[name]
            yield name


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, CONTAINERS):
            return False
        if isinstance(m, _LAYERS) and type(m).forward.__module__.startswith("torch.nn"):
            return True
        return type(m).__module__.startswith(("torch.nn", "slimkernels.nn", "torch.ao")) or super().is_leaf_module(
            m, module_qualified_name
        )


def trace(model: nn.Module, *, training: bool = False) -> ModelGraph:
    """The call structure of ``model`` in the given mode. Never raises: what cannot be traced gives ``reason``."""
    try:
        scratch = scratch_copy(model, training=training)
        if "forward" in vars(scratch):
            return ModelGraph(reason="its forward was replaced on the instance, past its class")
        signature = inspect.signature(type(scratch).forward)
        optional = {
            name: p.default
            for name, p in list(signature.parameters.items())[1:]
            if p.default is not inspect.Parameter.empty and p.kind is not inspect.Parameter.KEYWORD_ONLY
        }
        keyword_only = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        if keyword_only or len(optional) > _MAX_OPTIONAL_ARGUMENTS:
            which = ", ".join(keyword_only) if keyword_only else f"{len(optional)} optional arguments"
            return ModelGraph(reason=f"its forward takes {which}, whose every use cannot be traced")
        graphs = []
        for given in itertools.product((False, True), repeat=len(optional)):
            concrete = {name: default for (name, default), g in zip(optional.items(), given, strict=True) if not g}
            # What the forward draws at random does not depend on its input, so it is drawn in earnest.
            with torch.random.fork_rng(devices=()):
                graphs.append(_structure(scratch, _Tracer().trace(scratch, concrete_args=concrete or None)))
    except Exception as error:  # user code runs under the tracer and may raise anything
        return ModelGraph(reason=f"torch.fx cannot trace it ({in_a_line(error)})")
    calls: Counter[str] = Counter()
    for graph in graphs:
        calls |= Counter(graph.calls)
    followers = [
        {(a, b) for a, b in g.follower.items()} | {(a, None) for a in calls if a not in g.follower} for g in graphs
    ]
    agreed = set.intersection(*followers)
    return ModelGraph(
        calls=dict(calls),
        follower={a: b for a, b in agreed if b is not None},
        tensor_reads=frozenset().union(*(g.tensor_reads for g in graphs)),
        order=tuple(g.order for g in graphs),
    )


def fx_graph(model: nn.Module) -> fx.Graph:
    """The `torch.fx` graph of the eval-mode forward, optional arguments at their defaults; layers are its leaves.

    Raises:
        ValueError: the model cannot be traced.
    """
    scratch = scratch_copy(model)
    parameters = list(inspect.signature(type(scratch).forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    try:
        return _Tracer().trace(scratch, concrete_args=defaults or None)
    except Exception as error:  # user code runs under the tracer and may raise anything
        raise ValueError(f"torch.fx cannot trace it ({in_a_line(error)})") from error


def _structure(model: nn.Module, graph: fx.Graph) -> ModelGraph:
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    reads = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    follower = {}
    for node in graph.nodes:
        if node.op != "call_module" or calls[str(node.target)] != 1:
            continue
        target = _single_consumer(model, node)
        if target is not None and calls[str(target.target)] == 1:
            follower[str(node.target)] = str(target.target)
    order = tuple((n.name, n.op, _named(n.target), _named((n.args, n.kwargs))) for n in graph.nodes)
    return ModelGraph(calls=dict(calls), follower=follower, tensor_reads=frozenset(reads), order=order)


def _named(value: Any) -> Any:
    """A target or arguments of a node in what can be compared between the graphs of two copies of a model."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_named, value))
    if isinstance(value, Mapping):
        return tuple((key, _named(part)) for key, part in value.items())
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (str, bool, int, float, type(None), torch.dtype, torch.device)):
        return repr(value)  # a NaN is not equal to itself
    return getattr(value, "__qualname__", type(value).__qualname__)


def other_calls(model: nn.Module, graph: ModelGraph, converted: nn.Module, *, training: bool = False) -> str | None:
    """Why the forward of a converted model does something else than that of the model, whose graph is given.

    It does where it asks for the types of its layers (``isinstance(layer, nn.ReLU)``), which are others now. None where
    both make the same calls, those of an nn.Identity apart, which a forward may leave out, and where the model cannot
    be traced or makes others each time.
    """
    if graph.reason is not None:
        return None
    got = trace(converted, training=training)
    idle = {repr(name) for name, module in converted.named_modules() if type(module) is nn.Identity}

    def same(one: ModelGraph, other: ModelGraph) -> bool:
        return [_without(calls, idle) for calls in one.order] == [_without(calls, idle) for calls in other.order]

    if same(got, graph) or not same(trace(model, training=training), graph):
        return None
    if got.reason is not None:
        return f"the forward no longer runs as it did: {got.reason}"
    return "the forward makes other calls then, as one does that asks for the types of its layers"


def _without(calls: tuple[Any, ...], idle: Collection[str]) -> list[Any]:
    """The calls of a trace without those of modules that hand on what they are given."""
    given: dict[str, Any] = {}

    def through(value: Any) -> Any:
        return tuple(map(through, value)) if isinstance(value, tuple) else given.get(value, value)

    kept = []
    for name, op, target, taken in calls:
        taken = through(taken)
        if op == "call_module" and target in idle and len(taken[0]) == 1:
            given[name] = taken[0][0]
        else:
            kept.append((name, op, target, taken))
    return kept


def _single_consumer(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """The module call that alone takes the output of ``node``, looking through nn.Identity."""
    while True:
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_module" or users[0].args != (node,) or users[0].kwargs:
            return None
        if type(model.get_submodule(str(users[0].target))) is not nn.Identity:
            return users[0]
        node = users[0]


InputSet = tuple[tuple[Any, ...], dict[str, Any]]


def input_sets(example_inputs: Any) -> list[InputSet]:
    """Example inputs as ``(args, kwargs)`` pairs.

    A tensor is one positional argument, a tuple the positional arguments, a mapping the keyword arguments; a list holds
    several of these, each an input in its own right.

    Raises:
        TypeError: anything else. ValueError: an empty list.
    """
    if example_inputs is None:
        return []
    if isinstance(example_inputs, list):
        if not example_inputs:
            raise ValueError("convert: expected at least one example input, got an empty list")
        return [one for item in example_inputs for one in input_sets(item)]
    if isinstance(example_inputs, Tensor):
        return [((example_inputs,), {})]
    if isinstance(example_inputs, tuple):
        return [(example_inputs, {})]
    if isinstance(example_inputs, Mapping):
        return [((), dict(example_inputs))]
    raise TypeError(
        "convert: expected example_inputs to be a tensor, a tuple of arguments, a mapping of keyword arguments, or a "
        f"list of these, got {type(example_inputs).__name__}"
    )
