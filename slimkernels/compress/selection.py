"""Which layers a compression call touches: exact names, fnmatch patterns, and errors that name near misses."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from slimkernels.compress.fake_quantization import FakeQuantize
from slimkernels.conversion.graph import trace
from slimkernels.conversion.layers import type_obstacle
from slimkernels.conversion.readers import weight_readers
from slimkernels.formats import BlockMask, block_shape_2d

PRUNABLE = (nn.Conv2d, nn.Linear)
MIN_LINEAR_FEATURES = 64  # a default call leaves smaller Linears dense: they hold few weights and few whole blocks


@dataclass(frozen=True)
class SelectedLayer:
    """A layer picked by a caller: `explicit` says that its exact name was given, `key` the name or pattern that
    hit."""

    name: str
    module: nn.Module
    explicit: bool
    key: str | None


def as_patterns(op: str, argument: str, patterns: str | Iterable[str] | None) -> list[str]:
    """A list of names and patterns from one string, an iterable of strings, or None (empty)."""
    if patterns is None:
        return []
    if isinstance(patterns, str):
        return [patterns]
    out = list(patterns)
    for pattern in out:
        if not isinstance(pattern, str):
            raise TypeError(f"{op}: expected {argument} to hold layer names or patterns, got {pattern!r}")
    return out


def match_layers(
    op: str, argument: str, patterns: Iterable[str], modules: dict[str, nn.Module], types: tuple[type, ...]
) -> dict[str, str]:
    """Layer name -> the name or pattern that matched it; an exact name wins over a pattern.

    Args:
        op: public function's name, which begins every message.
        argument: its argument the patterns came from.
        modules: every module by name, duplicates included.
        types: layer classes that may match; modules of other classes are invisible to patterns.

    Raises:
        ValueError: a name or pattern matches no layer (near matches are listed), or names a module of another class.
    """
    candidates = {name: module for name, module in modules.items() if isinstance(module, types)}
    expected = " or ".join(t.__name__ for t in types)
    matched: dict[str, str] = {}
    for pattern in patterns:
        if pattern in candidates:
            matched[pattern] = pattern
            continue
        if pattern in modules:
            raise ValueError(
                f"{op}: expected {argument} to name {expected} layers, got {pattern!r}, which is a "
                f"{type(modules[pattern]).__name__}"
            )
        hits = [name for name in candidates if fnmatchcase(name, pattern)]
        if not hits:
            near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.3) or list(candidates)[:3]
            hint = f"near matches: {', '.join(near)}" if near else f"the model has no {expected}"
            raise ValueError(f"{op}: expected {argument} to match {expected} layers, got {pattern!r}; {hint}")
        for name in hits:
            matched.setdefault(name, pattern)
    return matched


def select_layers(
    op: str,
    model: nn.Module,
    types: tuple[type, ...],
    layers: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    layers_argument: str = "layers",
) -> list[SelectedLayer]:
    """The layers of `types` that `layers` (None: all) picks and `exclude` does not, in registration order.

    A module registered under several names is returned once, under the first name (or the one given exactly).

    Raises:
        ValueError: an entry of `layers` or `exclude` matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected model to be an nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    excluded = match_layers(op, "exclude", as_patterns(op, "exclude", exclude), modules, types)
    picked: dict[str, str | None]
    if layers is None:
        picked = {name: None for name, module in modules.items() if isinstance(module, types)}
    else:
        picked = dict(match_layers(op, layers_argument, as_patterns(op, layers_argument, layers), modules, types))
    dropped = {id(modules[name]) for name in excluded}
    selected: dict[int, SelectedLayer] = {}
    for name, module in modules.items():
        if name not in picked or id(module) in dropped:
            continue
        layer = SelectedLayer(name, module, explicit=picked[name] == name, key=picked[name])
        previous = selected.get(id(module))
        if previous is None or (layer.explicit and not previous.explicit):
            selected[id(module)] = layer
    return list(selected.values())


def prunable_layers(
    op: str,
    model: nn.Module,
    layers: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    skip_first: bool,
    layers_argument: str = "layers",
    verb: str = "prune",
) -> list[SelectedLayer]:
    """The layers that a pruning call touches, by the rules that `slimkernels.prune_` states.

    A warning lists the layers that would be pruned, were they not such that conversion cannot take them. Where that is
    all of them, the result is empty.

    Raises:
        ValueError: an entry matches nothing, or names a layer with groups != 1, or no layer is left by the rules.
    """
    picked = select_layers(op, model, PRUNABLE, layers, exclude, layers_argument)
    every = [module for module in model.modules() if isinstance(module, PRUNABLE)]
    first = next((module for module in every if isinstance(module, nn.Conv2d)), None)
    out, passed_over = [], {}
    for layer in picked:
        module = layer.module
        if isinstance(module, nn.Conv2d) and module.groups != 1 and layer.explicit:
            raise ValueError(f"{op}: expected groups=1 in layer {layer.name!r}, got groups={module.groups}")
        rule = _rule_against(
            layer, skip_first and module is first, layers is None, len(every) > 1 and module is every[-1]
        )
        if rule is None:
            out.append(layer)
        else:
            passed_over[layer.name] = rule
    if not out:
        raise ValueError(_nothing_left(op, verb, passed_over, excluded=exclude is not None and not picked))
    reasons = _no_gain(model, out)
    if reasons:
        _warn_of_skipped(op, reasons)
    return [layer for layer in out if layer.name not in reasons]


def _rule_against(layer: SelectedLayer, first: bool, all_layers: bool, last: bool) -> str | None:
    """The rule by which a layer that nobody named is left out; None where it is taken."""
    module: Any = layer.module
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"groups={module.groups}"
    if layer.explicit:
        return None
    if first:
        return "the first convolution (skip_first)"
    if all_layers and isinstance(module, nn.Linear):
        if min(module.in_features, module.out_features) < MIN_LINEAR_FEATURES:
            return f"a Linear of fewer than {MIN_LINEAR_FEATURES} features"
        if last:
            return "the last Linear, the classifier"
    return None


def _nothing_left(op: str, verb: str, passed_over: Mapping[str, str], *, excluded: bool) -> str:
    """Why no layer is left, rule by rule, and what to do."""
    start = f"{op}: expected at least one Conv2d or Linear to {verb}, got"
    if not passed_over:
        return f"{start} none after the exclusions" if excluded else f"{start} a model without any"
    shown = [f"{name}: {rule}" for name, rule in list(passed_over.items())[:5]]
    more = f" and {len(passed_over) - 5} more" if len(passed_over) > 5 else ""
    return (
        f"{start} none that a call without names takes ({'; '.join(shown)}{more}); name layers to {verb} them all the "
        f"same, as in layers={[n for n, rule in passed_over.items() if 'groups' not in rule][:2]}"
    )


def _no_gain(model: nn.Module, picked: Sequence[SelectedLayer]) -> dict[str, str]:
    """Layers that nobody named and whose zeros conversion could not use -> why: accuracy would be lost for nothing.

    These are the questions that conversion asks, but for hooks, which come and go while a model trains.
    """
    asked = [layer for layer in picked if not layer.explicit and layer.module is not model]
    if not asked:
        return {}
    readers = weight_readers(model, [trace(model)])  # in eval mode, in which the sparse model will run
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for layer in asked:
        weight = layer.module._parameters.get("weight")
        if weight is not None and is_lazy(weight):
            continue  # it has to be refused by name: after the first call it may be taken
        reason = type_obstacle(layer.module) or readers.get(names[id(layer.module)])
        if reason is not None:
            found[layer.name] = reason
    return found


def _warn_of_skipped(op: str, reasons: Mapping[str, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{', '.join(names[:3])}{more} ({reason})")
    count = "1 layer stays" if len(reasons) == 1 else f"{len(reasons)} layers stay"
    warnings.warn(
        f"{op}: {count} dense, because convert could not use zeros there: {'; '.join(lines)}. To prune such a layer "
        "all the same give its exact name; exclude silences this",
        stacklevel=5,
    )


def block_shapes_of(
    op: str,
    model: nn.Module,
    layers: Sequence[SelectedLayer],
    block_shape: Sequence[int] | Mapping[str, Sequence[int]],
) -> dict[str, tuple[int, int]]:
    """The block shape of each layer: one for all, or a dict by name or pattern (a name beats a pattern).

    Raises:
        ValueError: a bad shape, a key that matches no layer, or a layer without an entry.
    """
    if not isinstance(block_shape, Mapping):
        return {layer.name: block_shape_2d(block_shape, op) for layer in layers}
    modules = dict(model.named_modules(remove_duplicate=False))
    matched = match_layers(op, "block_shape", as_patterns(op, "block_shape", block_shape), modules, PRUNABLE)
    missing = [layer.name for layer in layers if layer.name not in matched]
    if missing:
        near = difflib.get_close_matches(missing[0], list(block_shape), n=3, cutoff=0.3) or list(block_shape)[:3]
        raise ValueError(
            f"{op}: expected block_shape to have an entry for layer {missing[0]!r}, got {', '.join(map(repr, near))}"
        )
    return {layer.name: block_shape_2d(block_shape[matched[layer.name]], op) for layer in layers}


def lone_mask(op: str, name: str, module: Any) -> BlockMask | None:
    """The BlockMask on the weight of a layer, None where there is none; `FakeQuantize` may be beside it.

    Raises:
        ValueError: it carries another parametrization.
    """
    if not parametrize.is_parametrized(module, "weight"):
        return None
    chain = list(module.parametrizations.weight)
    masks = [part for part in chain if isinstance(part, BlockMask)]
    if len(masks) < 2 and all(isinstance(part, (BlockMask, FakeQuantize)) for part in chain):
        return masks[0] if masks else None
    raise ValueError(
        f"{op}: expected no parametrization but a BlockMask on the weight of layer {name!r}, "
        f"got {[type(p).__name__ for p in chain]}; remove the others first"
    )


def readable_weight(op: str, name: str, module: Any) -> nn.Parameter:
    """The Parameter behind the weight of a layer: under its mask or rounding, where it has one.

    Raises:
        ValueError: another parametrization, a computed or an uninitialised weight.
    """
    lone_mask(op, name, module)
    computed = parametrize.is_parametrized(module, "weight")
    weight = module.parametrizations.weight.original if computed else module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter) or is_lazy(weight):
        raise ValueError(
            f"{op}: expected the weight of layer {name!r} to be a Parameter, got one that is "
            "computed (torch.nn.utils.prune?) or not initialised yet; remove that first or exclude the layer"
        )
    return weight
