"""Compression: block pruning, low-rank factorization, distillation and the training loop around them.

Names are imported from their submodule on first use, so importing the package loads torch alone.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "prune_": "prune",
    "finalize_": "prune",
    "masks": "prune",
    "cubic_schedule": "prune",
    "linear_schedule": "prune",
    "factorize_": "factorize",
    "factorization_report": "factorize",
    "truncated_svd": "factorize",
    "rank_by_energy": "factorize",
    "tai": "factorize",
    "svd_conv": "factorize",
    "tucker2": "factorize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
