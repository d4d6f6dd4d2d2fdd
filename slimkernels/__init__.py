"""slimkernels: pruned and factorized networks as fast as their FLOP count promises.

    >>> import slimkernels as sk
    >>> sk.prune_(model, sparsity=0.875, block_shape=(16, 1))    # doctest: +SKIP
    >>> fast = sk.convert(model, example_inputs=x)               # doctest: +SKIP
    >>> print(sk.explain(fast))                                  # doctest: +SKIP

Importing this package imports torch alone and registers the ops; every other public name is loaded at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slimkernels import ops

__version__ = "0.1.0"

_PUBLIC = {
    "BSRWeight": "formats",
    "BlockMask": "formats",
    "LowRankWeight": "formats",
    "ModelPlan": "conversion.plan",
    "LayerPlan": "conversion.plan",
    "GradualPruning": "compress.pruning.gradual",
    "Policy": "conversion.plan",
    "SparseTraining": "compress.pruning.sparse_training",
    "QuantizationAware": "compress.quantization",
    "analyze": "conversion.analysis",
    "convert": "conversion",
    "distill": "compress.distillation.distill",
    "evaluate": "compress.training.train",
    "explain": "conversion",
    "export_onnx": "inference",
    "factorize_": "compress.factorization.factorize",
    "finalize_": "compress.pruning.prune",
    "fine_tune": "compress.training.train",
    "fuse_batch_norm_": "conversion.batch_norms",
    "graphed": "inference",
    "latency_budget": "compress.pruning.budget",
    "load": "checkpoint",
    "masks": "compress.pruning.prune",
    "prune_": "compress.pruning.prune",
    "quantize_": "checkpoint",
    "restore_batch_norm_": "conversion.batch_norms",
    "save": "checkpoint",
    "sensitivity_scan": "compress.pruning.sensitivity",
    "shrink_": "compress.pruning.shrink",
    "to_dense": "conversion",
    "unit_costs": "compress.pruning.latency",
    "update_pattern": "pattern",
    "warm_up": "inference",
}
_SUBMODULES = ("compress", "formats", "kernels", "models", "nn")

__all__ = [*_PUBLIC, *_SUBMODULES, "__version__", "ops"]

if TYPE_CHECKING:
    from slimkernels import compress, formats, kernels, models, nn
    from slimkernels.checkpoint import load, quantize_, save
    from slimkernels.compress.distillation.distill import distill
    from slimkernels.compress.factorization.factorize import factorize_
    from slimkernels.compress.pruning.budget import latency_budget
    from slimkernels.compress.pruning.gradual import GradualPruning
    from slimkernels.compress.pruning.latency import unit_costs
    from slimkernels.compress.pruning.prune import finalize_, masks, prune_
    from slimkernels.compress.pruning.sensitivity import sensitivity_scan
    from slimkernels.compress.pruning.shrink import shrink_
    from slimkernels.compress.pruning.sparse_training import SparseTraining
    from slimkernels.compress.quantization import QuantizationAware
    from slimkernels.compress.training.train import evaluate, fine_tune
    from slimkernels.conversion import convert, explain, to_dense
    from slimkernels.conversion.analysis import analyze
    from slimkernels.conversion.batch_norms import fuse_batch_norm_, restore_batch_norm_
    from slimkernels.conversion.plan import LayerPlan, ModelPlan, Policy
    from slimkernels.formats import BlockMask, BSRWeight, LowRankWeight
    from slimkernels.inference import export_onnx, graphed, warm_up
    from slimkernels.pattern import update_pattern


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"slimkernels.{_PUBLIC[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"slimkernels.{name}")
    else:
        raise AttributeError(f"module 'slimkernels' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
