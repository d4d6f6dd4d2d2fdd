"""What a step of a recipe does while it trains: prunes, rounds values, runs sparse layers as such."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from slimkernels.compress.pruning.budget import latency_budget
from slimkernels.compress.pruning.gradual import GradualPruning
from slimkernels.compress.pruning.latency import unit_costs
from slimkernels.compress.pruning.sparse_training import SparseTraining
from slimkernels.compress.quantization import QuantizationAware
from slimkernels.compress.training.callbacks import Callback
from slimkernels.recipes.schema import Step

# From which a latency budget chooses, for every layer.
_SPARSITIES = (*(share / 64 for share in range(16, 64)), 127 / 128)


def callbacks_of(step: Step, model: nn.Module, images: torch.Tensor) -> list[Callback]:
    """What a training step does beside training: it prunes, rounds, and runs sparse layers as such, in this order.

    Args: images of the largest batch that is timed, in the dtype in which it is; of a model, only layers are looked at.
    """
    callbacks: list[Callback] = []
    if "prune" in step.companions:
        callbacks.append(pruning(step.companions["prune"], model, images))
    if "quantize" in step.companions:
        callbacks.append(QuantizationAware(**step.companions["quantize"]))
    if "sparse" in step.companions:
        callbacks.append(SparseTraining(**step.companions["sparse"]))
    return callbacks


def pruning(settings: Mapping[str, Any], model: nn.Module, images: torch.Tensor) -> GradualPruning:
    """The `GradualPruning` of a step's ``prune`` mapping.

    ``speedup`` in place of ``sparsity`` takes the sparsities of a `latency_budget` for that speed-up of ``model`` on
    ``images``, in their dtype. ``scope: latency`` ranks all blocks together by importance per predicted second.
    """
    options = dict(settings)
    if "speedup" in options or options.get("scope") == "latency":
        model = copy.deepcopy(model).to(images.dtype)
    shape = block_shape(options.pop("block_shape", (16, 1)))
    if "speedup" in options:
        plan = latency_budget(
            model, images, options.pop("speedup"), block_shapes=[shape], sparsities=_SPARSITIES, progress=False
        )
        return GradualPruning(plan.sparsity, plan.block_shapes, **options)
    if options.get("scope") == "latency":
        costs = unit_costs(model, images, shape, granularity=options.get("granularity", "block"))
        options |= {"scope": "global", "costs": costs, "layers": list(costs)}
    return GradualPruning(options.pop("sparsity", 0.875), shape, **options)


def block_shape(value: Any) -> tuple[int, int]:
    """``16x1`` or ``[16, 1]`` as a pair. Raises ValueError for anything else."""
    parts = (
        value.lower().split("x") if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else []
    )
    if len(parts) != 2 or not all(str(part).strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"recipe: expected block_shape of two positive numbers as in 16x1, got {value!r}")
    return int(parts[0]), int(parts[1])
