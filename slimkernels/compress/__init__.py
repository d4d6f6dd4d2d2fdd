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
    "apply_masks_": "prune",
    "mask_sparsity": "prune",
    "cubic_schedule": "schedules",
    "linear_schedule": "schedules",
    "one_shot_schedule": "schedules",
    "iterative_schedule": "schedules",
    "GradualPruning": "gradual",
    "taylor_scores": "importance",
    "movement_scores": "importance",
    "sensitivity_scan": "sensitivity",
    "latency_budget": "budget",
    "shrink_": "shrink",
    "factorize_": "factorize",
    "factorization_report": "factorize",
    "truncated_svd": "factorize",
    "rank_by_energy": "ranks",
    "vbmf_rank": "ranks",
    "rank_for_budget": "ranks",
    "whitened_svd": "whitening",
    "input_moments": "whitening",
    "tai": "factorize",
    "svd_conv": "factorize",
    "tucker2": "factorize",
    "kd_loss": "losses",
    "decoupled_kd_loss": "losses",
    "hint_loss": "losses",
    "attention_transfer_loss": "losses",
    "Term": "terms",
    "KD": "terms",
    "DecoupledKD": "terms",
    "Hint": "terms",
    "AttentionTransfer": "terms",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
