"""Which layers a compression call touches: exact names, fnmatch patterns, and errors that name near misses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn


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
