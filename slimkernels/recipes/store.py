"""Finished steps on disk: a JSON of what came out, and the key by which a later run knows that it is still valid.

A step's key is the SHA-256 of its settings and of everything that went into it: the state before it, the teacher, the
data, the seed. A finished step is skipped when its key and the SHA-256 of its state file still hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkernels.files import atomic_path

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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is none, or not a whole one."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def finished(path: Path, key: str, state: Path | None = None) -> dict[str, Any] | None:
    """The result in ``path`` if it belongs to ``key`` and the ``state`` file beside it is the one that it speaks of."""
    result = read_json(path)
    if result is None or result.get("key") != key:
        return None
    if state is not None and (not state.is_file() or file_sha256(state) != result.get("state_sha256")):
        return None
    return result
