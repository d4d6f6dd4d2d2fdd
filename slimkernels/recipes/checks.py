"""Checks of values in a recipe; every message names where, what was expected and what came."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Mapping
from typing import Any


def mapping(value: Any, where: str, allowed: Collection[str] | None, required: Collection[str] = ()) -> dict[str, Any]:
    """A dict whose keys are text, all of them ``allowed`` (None: any), none of ``required`` missing."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{where}: expected a mapping, got {type(value).__name__} {value!r}")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{where}: expected text as key, got {key!r}")
        if allowed is not None and key not in allowed:
            raise ValueError(unknown(f"{where}: expected a key", key, allowed))
    for key in required:
        if key not in value:
            raise ValueError(f"{where}: expected key {key!r}, got {', '.join(value) or 'none'}")
    return dict(value)


def repeated_key(text: str) -> str | None:
    """Where a mapping of a YAML text has a key twice, of which YAML's own reader takes the last; None where nowhere."""
    import yaml

    left, seen = [yaml.compose(text, Loader=yaml.SafeLoader)], set()
    while left:
        node = left.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                left.append(value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in keys:
                    return f"{key.value!r} once more in line {key.start_mark.line + 1}"
                keys.add(key.value)
    return None


def unknown(what: str, got: str, known: Collection[str]) -> str:
    """A message for a name that does not exist, with the names that are near."""
    near = difflib.get_close_matches(got, list(known), n=3, cutoff=0.5)
    among = f"; did you mean {' or '.join(near)}?" if near else ""
    listed = ", ".join(itertools.islice(known, 20)) or "none"
    return f"{what} among {listed}, got {got!r}{among}"


def positive(value: Any, where: str) -> int:
    """An int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: expected a positive int, got {value!r}")
    return value


def listed(value: Any, where: str) -> list[Any]:
    """A list."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{where}: expected a list, got {value!r}")
    return list(value)


def seconds(value: Any, where: str) -> float | None:
    """A positive number of seconds, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
        raise ValueError(f"{where}: expected a positive number of seconds, got {value!r}")
    return None if value is None else float(value)
