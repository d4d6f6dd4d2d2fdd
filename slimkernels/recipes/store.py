"""Finished steps on disk: a JSON of what came out, and the key by which a later run knows that it is still valid.

A step's key is the SHA-256 of its settings and of everything that went into it: the state before it, the teacher, the
data, the seed. A finished step is skipped when its key, the SHA-256 of its result and that of its state file still
hold; else it is run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkernels.files import atomic_path, file_sha256, sealed_json, unsealed_json

# Part of every key: raised when a change of this package makes earlier results incomparable.
RESULTS_VERSION = 1


def key_of(**parts: Any) -> str:
    """SHA-256 of the parts as canonical JSON."""
    text = json.dumps({"version": RESULTS_VERSION, **parts}, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, set, frozenset)):
        return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    raise TypeError(f"key_of: expected JSON-able values, got {type(value).__name__}")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_result(path: Path, value: Mapping[str, Any]) -> None:
    """Like `write_json`, with a SHA-256 of the values, without which `read_result` does not believe them."""
    write_json(path, sealed_json(value))


def read_result(path: Path) -> dict[str, Any] | None:
    """What `write_result` wrote; None where there is no file, or one that is not whole."""
    try:
        return unsealed_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def finished(path: Path, key: str, state: Path | None = None) -> dict[str, Any] | None:
    """The result in ``path`` if it belongs to ``key`` and the ``state`` file beside it is the one that it speaks of."""
    result = read_result(path)
    if result is None or result.get("key") != key:
        return None
    if state is not None and (not state.is_file() or file_sha256(state) != result.get("state_sha256")):
        return None
    return result
