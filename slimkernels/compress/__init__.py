"""Compression: block pruning, low-rank factorization, distillation and the training loop around them.

Names are imported from their submodule on first use, so importing the package loads torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    "QuantizationAware": "quantization",
    "taylor_scores": "pruning.importance",
    "movement_scores": "pruning.importance",
    "sensitivity_scan": "pruning.sensitivity",
    "latency_budget": "pruning.budget",
    "shrink_": "pruning.shrink",
    "SparseTraining": "pruning.sparse_training",
    "unit_costs": "pruning.latency",
    "factorize_": "factorization.factorize",
    "factorization_report": "factorization.factorize",
    "truncated_svd": "factorization.factorize",
    "rank_by_energy": "factorization.ranks",
    "vbmf_rank": "factorization.ranks",
    "rank_for_budget": "factorization.ranks",
    "whitened_svd": "factorization.whitening",
    "output_moments": "factorization.whitening",
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

__all__ = [*_HOME]

if TYPE_CHECKING:
    from slimkernels.compress.distillation.losses import attention_transfer_loss, decoupled_kd_loss, hint_loss, kd_loss
    from slimkernels.compress.distillation.terms import KD, AttentionTransfer, DecoupledKD, Hint, Term
    from slimkernels.compress.factorization.factorize import (
        factorization_report,
        factorize_,
        svd_conv,
        tai,
        truncated_svd,
        tucker2,
    )
    from slimkernels.compress.factorization.ranks import rank_by_energy, rank_for_budget, vbmf_rank
    from slimkernels.compress.factorization.whitening import output_moments, whitened_svd
    from slimkernels.compress.pruning.budget import latency_budget
    from slimkernels.compress.pruning.gradual import GradualPruning
    from slimkernels.compress.pruning.importance import movement_scores, taylor_scores
    from slimkernels.compress.pruning.latency import unit_costs
    from slimkernels.compress.pruning.prune import apply_masks_, finalize_, mask_sparsity, masks, prune_
    from slimkernels.compress.pruning.schedules import (
        cubic_schedule,
        iterative_schedule,
        linear_schedule,
        one_shot_schedule,
    )
    from slimkernels.compress.pruning.sensitivity import sensitivity_scan
    from slimkernels.compress.pruning.shrink import shrink_
    from slimkernels.compress.pruning.sparse_training import SparseTraining
    from slimkernels.compress.quantization import QuantizationAware


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
