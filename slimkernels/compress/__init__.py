"""Compression: block pruning, low-rank factorization, distillation and the training loop around them.

Names are imported from their submodule on first use, so importing the package loads torch alone.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "prune_": "pruning.prune",
    "finalize_": "pruning.prune",
    "masks": "pruning.prune",
    "apply_masks_": "pruning.prune",
    "mask_sparsity": "pruning.prune",
    "cubic_schedule": "pruning.schedules",
    "linear_schedule": "pruning.schedules",
    "one_shot_schedule": "pruning.schedules",
    "iterative_schedule": "pruning.schedules",
    "GradualPruning": "pruning.gradual",
    "taylor_scores": "pruning.importance",
    "movement_scores": "pruning.importance",
    "sensitivity_scan": "pruning.sensitivity",
    "latency_budget": "pruning.budget",
    "shrink_": "pruning.shrink",
    "factorize_": "factorization.factorize",
    "factorization_report": "factorization.factorize",
    "truncated_svd": "factorization.factorize",
    "rank_by_energy": "factorization.ranks",
    "vbmf_rank": "factorization.ranks",
    "rank_for_budget": "factorization.ranks",
    "whitened_svd": "factorization.whitening",
    "input_moments": "factorization.whitening",
    "tai": "factorization.factorize",
    "svd_conv": "factorization.factorize",
    "tucker2": "factorization.factorize",
    "kd_loss": "distillation.losses",
    "decoupled_kd_loss": "distillation.losses",
    "hint_loss": "distillation.losses",
    "attention_transfer_loss": "distillation.losses",
    "Term": "distillation.terms",
    "KD": "distillation.terms",
    "DecoupledKD": "distillation.terms",
    "Hint": "distillation.terms",
    "AttentionTransfer": "distillation.terms",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
